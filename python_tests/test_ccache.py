"""cmake/ccache.cmake: another checkout finds what one has compiled, and who wants it otherwise has his way."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

MODULE = Path(__file__).parents[1] / "cmake" / "ccache.cmake"
PROJECT = """\
cmake_minimum_required(VERSION 3.20)
project(small LANGUAGES CXX)
include(cmake/ccache.cmake)
tgt_use_ccache()
message(STATUS "launcher: ${CMAKE_CXX_COMPILER_LAUNCHER}.")
add_library(theirs INTERFACE)
target_include_directories(theirs INTERFACE "$ENV{THEIRS}/include")
tgt_keep_headers(theirs theirs)
add_library(small OBJECT src/small.cpp)
target_link_libraries(small PRIVATE theirs)
target_include_directories(small PRIVATE src)
"""

pytestmark = [
    pytest.mark.skipif(not MODULE.exists(), reason="the tests run outside a checkout"),
    pytest.mark.skipif(
        shutil.which("cmake") is None or shutil.which("ccache") is None, reason="no cmake, or no ccache"
    ),
]


def checkout(folder: Path) -> Path:
    """A project with our module, and beside it the headers of somebody else, in a folder that is new each time."""
    for name in ("cmake", "src", "env/include/theirs"):
        (folder / name).mkdir(parents=True)
    shutil.copy(MODULE, folder / "cmake")
    (folder / "CMakeLists.txt").write_text(PROJECT)
    (folder / "env" / "include" / "theirs" / "theirs.h").write_text("inline int theirs() { return 1; }\n")
    (folder / "src" / "small.h").write_text("inline int small() { return 2; }\n")
    (folder / "src" / "small.cpp").write_text(
        '#include <theirs/theirs.h>\n#include "small.h"\nint x = theirs() + small();\n'
    )
    return folder


def cmake(folder: Path, cache: Path, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CCACHE_", "CMAKE_"))}
    environment |= {"CCACHE_DIR": str(cache), "THEIRS": str(folder / "env")}
    done = subprocess.run(
        ["cmake", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def hits(cache: Path) -> int:
    said = subprocess.run(
        ["ccache", "--print-stats"],
        env={**os.environ, "CCACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return sum(int(number) for number in re.findall(r"^(?:direct|preprocessed)_cache_hit\s+(\d+)", said, re.MULTILINE))


def test_another_checkout_finds_what_one_has_compiled(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for folder, wanted in (("a", 0), ("elsewhere/deeper", 1)):
        made = checkout(tmp_path / folder)
        cmake(made, cache, "-S", ".", "-B", "build/x")
        cmake(made, cache, "--build", "build/x")
        assert hits(cache) == wanted


def test_a_launcher_that_is_given_stays_and_off_is_off(tmp_path: Path) -> None:
    made = checkout(tmp_path / "a")
    assert "ccache" in cmake(made, tmp_path / "cache", "-S", ".", "-B", "build/on").partition("launcher: ")[2]
    given = cmake(made, tmp_path / "cache", "-S", ".", "-B", "build/given", "-DCMAKE_CXX_COMPILER_LAUNCHER=/bin/env")
    assert "launcher: /bin/env.\n" in given
    assert "launcher: .\n" in cmake(made, tmp_path / "cache", "-S", ".", "-B", "build/off", "-DTGT_CCACHE=OFF")
