"""Runs a WebAssembly program under wasmtime in the current folder: python scripts/run_wasm.py FILE [ARGUMENT ...]"""

import sys

import wasmtime

engine = wasmtime.Engine()
linker = wasmtime.Linker(engine)
linker.define_wasi()
store = wasmtime.Store(engine)
system = wasmtime.WasiConfig()
system.argv = sys.argv[1:]
system.preopen_dir(".", ".")
system.inherit_stdout()
system.inherit_stderr()
store.set_wasi(system)
exports = linker.instantiate(store, wasmtime.Module.from_file(engine, sys.argv[1])).exports(store)
try:
    exports["_start"](store)
except wasmtime.ExitTrap as end:
    sys.exit(end.code)
