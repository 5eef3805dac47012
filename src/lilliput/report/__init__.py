"""Reports of a finished job: one HTML page, tables for the terminal and RESULTS.md, a picture for a README.

``page(folder)`` builds the page, ``write(folder)`` puts it in ``folder/report.html``, ``verdict(summary)`` is its
first sentence. All is made from ``summary.json``, so a page can be rebuilt at any time (``lilliput report DIR``).
"""

from lilliput.report.page import page, write
from lilliput.report.summary import verdict

__all__ = ["page", "verdict", "write"]
