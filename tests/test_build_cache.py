"""What tests compile is kept, and nothing kept is out of date: another source, flag or compiler is another file."""

import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import build_cache
import pytest

from bench import machine_code, static_cuda

sys.path.insert(0, str(Path(__file__).with_name("host_cuda")))
import host_cuda


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(build_cache, "FOLDER", tmp_path / "cache")
    return tmp_path / "cache"


def test_a_digest_is_of_every_part(tmp_path):
    one, other = tmp_path / "one.h", tmp_path / "other.h"
    one.write_text("int x;")
    other.write_text("int x;")
    parts = [["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""], ["c", "ab"], [b"abc"], [one], [other], [one, other], []]
    digests = [build_cache.digest(p) for p in parts]
    one.write_text("int y;")
    digests.append(build_cache.digest([one]))
    assert len({*digests}) == len(digests)
    assert build_cache.digest(["ab", "c"]) == digests[0]


def test_another_source_is_made_anew(tmp_path):
    source, made = tmp_path / "source.cpp", []

    def make(path):
        made.append(source.read_text())
        path.write_text(source.read_text())

    for text in ("one", "two", "one", "two"):
        source.write_text(text)
        assert build_cache.built("library.so", [source], make).read_text() == text
    assert made == ["one", "two"]


def test_what_fails_leaves_nothing(folder):
    def fail(path):
        path.write_text("half")
        raise RuntimeError("no compiler")

    with pytest.raises(RuntimeError, match="no compiler"):
        build_cache.built("library.so", ["x"], fail)
    assert [path.suffix for path in folder.iterdir()] in ([], [".lock"])
    assert build_cache.built("library.so", ["x"], lambda path: path.write_text("whole")).read_text() == "whole"


def test_two_at_once_make_it_once():
    made = []

    def build(_):
        return build_cache.built("library.so", ["x"], lambda path: (made.append(path), path.write_text("x")))

    with ThreadPoolExecutor(4) as pool:
        assert len({*pool.map(build, range(8))}) == 1
    assert len(made) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="as tests/test_cuda_host.py")
def test_host_cuda_is_keyed_by_all_that_it_includes(monkeypatch, tmp_path):
    """By each source, each flag and the compiler's version."""
    import pybind11

    folders = [host_cuda.HERE, host_cuda.ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
    modules = [str(host_cuda.HERE / name) for name in (host_cuda.FUSED_STEP, host_cuda.OTHERS)]
    included = host_cuda._compiler("-MM", "-std=c++20", *[f"-I{f}" for f in folders], *modules)
    ours = {Path(w).resolve() for w in included.replace("\\\n", " ").split() if not w.endswith(".o:")}
    ours = {path for path in ours if host_cuda.ROOT.resolve() in path.parents and "site-packages" not in path.parts}
    assert len(ours) >= 4
    assert ours <= {source.resolve() for source in [*map(Path, modules), *host_cuda.INCLUDED]}

    told = {"--version": "compiler 1"}
    monkeypatch.setattr(host_cuda, "_compiler", lambda *a: told.get(a[0]) or Path(a[-1]).write_text("made"))
    build = host_cuda.build.__wrapped__
    paths = [build(), build(host_cuda.OTHERS)]
    assert build() == paths[0]
    told["--version"] = "compiler 2"
    paths.append(build())
    monkeypatch.setattr(host_cuda, "FLAGS", [*host_cuda.FLAGS, "-O1"])
    paths.append(build())
    for k, source in enumerate(host_cuda.INCLUDED):
        changed = tmp_path / source.name
        changed.write_bytes(source.read_bytes() + b"\n")
        with monkeypatch.context() as patch:
            patch.setattr(host_cuda, "INCLUDED", [*host_cuda.INCLUDED[:k], changed, *host_cuda.INCLUDED[k + 1 :]])
            paths.append(build())
    assert len({*paths}) == 4 + len(host_cuda.INCLUDED)


def test_nvcc_is_keyed_by_sources_flags_and_version(monkeypatch, tmp_path):
    """bench.static_cuda keeps its own files, in build/cubin."""
    (tmp_path / "csrc").mkdir()
    source, header = tmp_path / "csrc" / "kernel.cu", tmp_path / "csrc" / "kernel.h"
    source.write_text("1")
    header.write_text("1")
    nvcc = ["nvcc 1"]

    def run(*command, text=None):
        if "--version" in command:
            return nvcc[0]
        made = Path(command[command.index("-o") + 1])
        for file in (made, made.with_suffix(".ptx")):
            file.write_text("made")
        return ""

    monkeypatch.setattr(static_cuda, "ROOT", tmp_path)
    monkeypatch.setattr(static_cuda, "_run", run)

    def built(arch, kind):
        return static_cuda.built(arch, kind, source)

    paths = [built("sm_90", "cubin")]
    assert built("sm_90", "cubin") == paths[0]
    paths += [built("sm_80", "cubin"), built("sm_90", "ptx")]
    source.write_text("2")
    paths.append(built("sm_90", "cubin"))
    header.write_text("2")
    paths.append(built("sm_90", "cubin"))
    nvcc[0] = "nvcc 2"
    paths.append(built("sm_90", "cubin"))
    monkeypatch.setattr(static_cuda, "FLAGS", ("-O0",))
    paths.append(built("sm_90", "cubin"))
    assert len({*paths}) == 7


def test_disassemblies_are_keyed_by_what_is_read_and_by_the_tools(monkeypatch):
    told = {"version": "1"}
    monkeypatch.setattr(build_cache, "version", lambda *command: told["version"])
    monkeypatch.setattr(machine_code, "nvidia_tool", lambda name: name)
    read = []

    def disassemble(cubin):
        read.append(cubin)
        return cubin.decode(), {"REG": len(read)}

    for cubin in (b"one", b"two", b"one", b"two"):
        assert build_cache.disassembled(disassemble, cubin)[0] == cubin.decode()
    assert read == [b"one", b"two"]
    told["version"] = "2"
    assert build_cache.disassembled(disassemble, b"one") == ("one", {"REG": 3})
