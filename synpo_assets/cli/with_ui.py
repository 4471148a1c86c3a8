"""Runs a module of Dagster in a process that ends when `synpo ui` does: `python -m synpo_assets.cli.with_ui MODULE ...`.

A daemon that outlived its UI would launch what the daemon of the next one launches, too.
"""

import os
import runpy
import sys

from resources.common.processes import UI_PROCESS, end_with_this_parent

if __name__ == "__main__":
    end_with_this_parent(int(os.environ[UI_PROCESS]))
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
