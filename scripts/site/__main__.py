"""Writes the pages that the site is made of, and its configuration: python -m scripts.site build/site"""

from __future__ import annotations

import pathlib
import shutil
import sys

from scripts.site.pages import ROOT, Pages
from scripts.site.protos import grpc_page
from scripts.site.reference import write_reference


def main() -> None:
    out = pathlib.Path(sys.argv[1]).resolve()
    shutil.rmtree(out, ignore_errors=True)
    (out / "docs").mkdir(parents=True)
    Pages(out / "docs").write()
    write_reference(out / "docs", grpc_page())
    settings = (pathlib.Path(__file__).parent / "zensical.toml").read_text("utf8")
    (out / "zensical.toml").write_text(settings.replace('"REPOSITORY"', f'"{ROOT}"'), "utf8")


if __name__ == "__main__":
    main()
