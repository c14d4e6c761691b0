"""The page for a hospital names commands and options that exist, and numbers that were recorded."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fedkd_utils import engine_recorded
from fedkd_utils.provenance import NUMBERS
from fedkd_utils.settings import QUICK

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "hospital.md").read_text(encoding="utf-8")
BLOCKS = {kind: re.findall(rf"```{kind}\n(.*?)```", PAGE, re.S) for kind in ("bash", "python")}


@pytest.mark.parametrize("program", ["flower-supernode", "flower-superlink"])
def test_the_options_of_the_engine_exist(program: str) -> None:
    pytest.importorskip("flwr")
    path = Path(sys.executable).parent / program
    said = subprocess.run([path, "--help"], capture_output=True, text=True, check=True).stdout
    (command,) = (block for block in BLOCKS["bash"] if f"{program} " in block)
    options = re.findall(r"--[a-z-]+", command[command.index(program) :])
    assert len(options) >= 4 and not [option for option in options if option not in said]


def test_the_commands_of_flwr_exist() -> None:
    pytest.importorskip("flwr")
    flwr = Path(sys.executable).parent / "flwr"
    for words in set(re.findall(r"^flwr (supernode \w+|run)", "\n".join(BLOCKS["bash"]), re.M)):
        done = subprocess.run([flwr, *words.split(), "--help"], capture_output=True, text=True)
        assert done.returncode == 0, words


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_the_certificates_of_the_page_are_valid(tmp_path: Path) -> None:
    (block,) = (block for block in BLOCKS["bash"] if "openssl" in block)
    subprocess.run(["bash", "-ec", block], cwd=tmp_path, check=True, capture_output=True)
    check = ["openssl", "verify", "-CAfile", "ca.pem", "-verify_hostname", "federation.example.org", "server.pem"]
    assert "OK" in subprocess.run(check, cwd=tmp_path, check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
def test_the_key_of_the_page_is_one_that_the_engine_reads(tmp_path: Path) -> None:
    (block,) = (block for block in BLOCKS["bash"] if "ssh-keygen" in block)
    subprocess.run(["bash", "-ec", block], cwd=tmp_path, check=True, capture_output=True)
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    key = serialization.load_ssh_private_key((tmp_path / "secrets" / "north").read_bytes(), None)
    assert key.curve.name == "secp384r1"
    assert (tmp_path / "secrets").stat().st_mode & 0o077 == 0


def test_the_python_of_the_page_names_what_is_there() -> None:
    pytest.importorskip("flwr")
    (block,) = BLOCKS["python"]
    tree = ast.parse(block)
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names: dict[str, object] = {}
    exec(compile(ast.Module(imports, []), "page", "exec"), names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
            assert hasattr(names[node.value.id], node.attr), ast.unparse(node)


def test_what_was_recorded_of_the_engine_is_not_stale() -> None:
    facts = engine_recorded.recorded()
    assert facts["numbers"] == NUMBERS and facts["command"] == "python -m fedkd_utils bench engine"
    for found, wanted in (
        (facts["lesson"]["settings"], engine_recorded.LESSON),
        (facts["settings"], replace(QUICK, rounds=facts["settings"]["rounds"])),
    ):
        assert found == json.loads(json.dumps(asdict(wanted))), "make it again with the command that it names"
    assert all(line["largest_difference_of_a_weight"] == 0 for line in facts["overhead"])
    assert "host" not in facts["machine"] and not re.search(r"/(?:root|work|home|tmp)/", json.dumps(facts))


def test_the_numbers_of_the_page_were_recorded() -> None:
    facts = engine_recorded.recorded()
    assert f"weights are {facts['weights'] / 1e6:.1f} MB" in PAGE
    headers = 128 * 8  # of the tensors of a network
    for line in facts["traffic"]:
        carries = (line["message"], line["direction"]) not in {
            *[("query.hello", "up"), ("query.hello", "down"), ("query.teacher", "up"), ("evaluate", "up")]
        }
        rest = line["bytes"] - (facts["weights"] + headers if carries else 0)
        assert 0 < rest < 4000, line
    kinds = {line["message"] for line in facts["traffic"]}
    assert all(f"| `{kind}`" in PAGE for kind in kinds)
