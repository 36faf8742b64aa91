"""Reports a person wants to look at: self-contained HTML pages and PNG plots."""

from tgt_fast.report.grid import save_grid
from tgt_fast.report.looking import run
from tgt_fast.report.output import prepare_file, prepare_folder, write_json
from tgt_fast.report.page import Page
from tgt_fast.report.tensorboard import tensorboard
from tgt_fast.report.training import of_folder

__all__ = ["Page", "of_folder", "prepare_file", "prepare_folder", "run", "save_grid", "tensorboard", "write_json"]
