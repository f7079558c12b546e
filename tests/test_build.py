"""The C++ engine without Python: the self-check against plain loops, and the interface that C callers rely on."""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fasternet import native

CSRC = Path(native.__file__).parent / "csrc"
COMPILER = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")


def test_the_layout_of_structs_and_the_interface_number_are_those_of_the_header():
    header = (CSRC / "fasternet.h").read_text(encoding="utf-8")
    assert int(re.search(r"#define FN_INTERFACE (\d+)", header).group(1)) == native._INTERFACE
    assert ctypes.sizeof(native._Layer) == 8 * 4 + 8 * ctypes.sizeof(ctypes.c_void_p)
    assert ctypes.sizeof(native._Input) == ctypes.sizeof(ctypes.c_void_p) + 2 * 4 + 4 * 8
    names = re.search(r"typedef struct \{\s*int32_t kind.*?\} fn_layer;", header, re.DOTALL).group(0)
    for name, *_ in native._Layer._fields_[:8]:
        assert re.search(rf"\b{name}\b", names), name
    assert set(re.findall(r"\b(fn_\w+)\(", header)) == set(native._FUNCTIONS)


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_where_there_is_a_compiler_there_is_the_library():
    assert native.explain_native("portable") is None


@pytest.mark.skipif(not CSRC.is_dir(), reason="the sources are not beside the package")
@pytest.mark.skipif(native.explain_native("portable") is not None, reason="the library was not built")
def test_the_library_is_that_of_its_sources():
    sources = sorted([*CSRC.glob("*.cpp"), *CSRC.glob("*.h"), CSRC / "CMakeLists.txt"])
    digests = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in sources)
    built_from = native._library().fn_source().decode()
    assert built_from == hashlib.sha256(digests.encode()).hexdigest(), (
        "the library is older than its sources: run make install"
    )


@pytest.mark.skipif(native.explain_native("portable") is not None, reason="the library was not built")
def test_only_the_interface_is_visible():
    path = native._library()._name
    tool = shutil.which("nm")
    if tool is None:
        pytest.skip("nm, which lists symbols, is missing")
    listed = subprocess.run([tool, "-D", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1].partition("@")[0] for line in listed.splitlines()}
    assert names == set(native._FUNCTIONS)


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
@pytest.mark.skipif(native.explain_native("portable") is not None, reason="the library was not built")
def test_the_self_check_passes_on_every_instruction_set(tmp_path):
    library, program = native._library()._name, tmp_path / "selfcheck"
    command = [COMPILER, "-std=c++20", "-O1", f"-I{CSRC}", CSRC / "selfcheck.cpp", library, "-o", program]
    subprocess.run([*command, f"-Wl,-rpath,{Path(library).parent}"], check=True, timeout=120)
    result = subprocess.run([program], capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "portable fp32: 25 cases, largest relative error" in result.stdout
    ready = [isa for isa in native.ISAS if native.explain_native(isa, "fp32") is None]
    assert re.findall(r"^(\w+) fp32", result.stdout, re.MULTILINE) == ready
