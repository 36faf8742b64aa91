"""Reports a person wants to look at: self-contained HTML pages and PNG plots."""

from tgt_fast.report.output import prepare_file, prepare_folder, write_json
from tgt_fast.report.page import Page

__all__ = ["Page", "prepare_file", "prepare_folder", "write_json"]
