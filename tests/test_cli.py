"""The command line as scripts see it: JSON on stdout, one sentence and exit 2 on an error, nothing lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CSV = "model,top1_pct,energy_mj,latency_ms\nvit_small,81.4,2448,300\nlevit_conv_192,79.86,1150,140\ntiny_vit_11m_distilled,83.2,1400,180\n"


def edgejoule(
    *args: str, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgejoule", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | (env or {}), timeout=timeout, check=False)


def value(*args: str, **options: Any) -> Any:
    done = edgejoule(*args, "--json", **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refused(*args: str, **options: Any) -> str:
    done = edgejoule(*args, **options)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: "), done.stderr
    return last


def test_screen_keeps_exactly_the_thirteen() -> None:
    rows = value("screen", "--pool", "e3p")["candidates"]
    assert len(rows) == 25
    kept = [row["name"] for row in rows if row["kept"]]
    assert len(kept) == 13
    assert kept[0] == "efficientvit_b1"
    assert all(row["reason"] for row in rows if not row["kept"])
    assert set(rows[0]) >= {"name", "top1_pct", "params_m", "macs_g", "netscore", "kept", "reason"}
    explicit = value("screen", "--pool", "e3p", "--min-top1-pct", "79", "--max-params-m", "23", "--max-macs-g", "5")["candidates"]
    assert explicit == rows


def test_zoo_show_counts_and_quotes() -> None:
    shown = value("zoo", "show", "levit_conv_192")
    assert set(shown) >= {"name", "family", "params", "macs", "input_size", "published"}
    assert shown["params"] / 1e6 == pytest.approx(shown["published"]["params_m"], rel=0.02)
    assert set(shown["published"]) >= {"top1_pct", "params_m", "macs_g", "source"}


def test_zoo_list_names_pools() -> None:
    assert len(value("zoo", "list", "--pool", "e3p")["models"]) == 25


def test_rank_takes_any_table(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(CSV)
    found = value("rank", str(tmp_path / "t.csv"), "--sensitivity")
    rows = found["rows"]
    assert [row["rank"] for row in rows] == [1, 2, 3]
    assert set(rows[0]) >= {"model", "sam", "efficiency_pct_per_mj", "pareto_energy", "pareto_latency", "rank"}
    assert rows[0]["sam"] == pytest.approx(0.632, abs=0.01)
    assert found["sensitivity"]
    assert "levit_conv_192" in edgejoule("rank", str(tmp_path / "t.csv")).stdout


def test_rank_refuses_an_energy_where_sam_changes_sign(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(CSV + "tiny,50,0.5,1\n")
    assert "tiny" in refused("rank", str(tmp_path / "t.csv"))
    assert value("rank", str(tmp_path / "t.csv"), "--metric", "efficiency")["rows"][0]["model"] == "tiny"


def test_doctor_says_what_is_missing() -> None:
    found = value("doctor")
    assert {"meters", "backends", "transports"} <= set(found)
    meters = {row["name"]: row for row in found["meters"]}
    assert meters["estimate"]["ok"] is True
    assert all(row["remedy"] for rows in found.values() for row in rows if not row["ok"])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("zoo", "show", "levit_conv_129"), "levit_conv_192"),
        (("run", "quikstart"), "quickstart"),
        (("screen", "--pool", "e4p"), "e3p"),
        (("rank", "nothing.csv"), "nothing.csv"),
        (("report", "nothing.sqlite"), "no results file"),
        (("compile", "vit_small", "--backend", "onnxruntim"), "onnxruntime"),
        (("measure", "vit_small", "--meter", "rapl(root='/nowhere')", "--profile", "quick"), "rapl"),
        (("measure", "vit_small", "--profile", "quik"), "quick"),
        (("measure", "vit_small", "--batch", "4"), "offline"),
        (("measure", "vit_small", "--images", "folder(path='/nowhere')"), "/nowhere"),
        (("compile", "no_such_module:thing"), "no_such_module"),
        (("rank", "t.csv", "--a", "nan", "--json"), "--a: expected a finite number"),
        (("screen", "--min-top1-pct", "nan"), "--min-top1-pct: expected a finite number"),
        (("measure", "vit_small", "--threads", "100000"), "--threads"),
        (("measure", "m" * 300, "--json"), "name too long"),
        (("report", "m" * 300), "name too long"),
        (("report", "postgresql+psycopg://somebody:secret@127.0.0.1:1/none"), "somebody:***@"),
        (("rank", "postgresql+psycopg://somebody:secret@127.0.0.1:1/none"), "somebody:***@"),
        (("compile", "vit_small", "--out", "."), "there already"),
        (("measure", "vit_small", "--meter", "none(x=1)"), "takes no options"),
        (("reproduce", "edgevitt"), "did you mean edgevit?"),
        (("reproduce", "edgevitt", "--json"), "did you mean edgevit?"),
        (("compile", "edgevit_xxs", "--recipe", "nonsense"), "no pass is called 'nonsense'"),
        (("compile", "edgevit_xxs", "--recipe", "fuse("), "cannot read 'fuse('"),
        (("measure", "edgevit_xxs", "--recipe", "fuze", "--meter", "none"), "did you mean fuse?"),
        (("measure", ".", "--recipe", "fuse", "--meter", "none"), "leave --recipe out"),
    ],
)
def test_a_users_error_is_one_sentence(args: tuple[str, ...], said: str, tmp_path: Path) -> None:
    assert said in refused(*args, cwd=tmp_path)


def test_a_malformed_study_names_line_and_key(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text('[study]\nname = "s"\n[screen]\nmodels = ["vit_small"]\nmin_top_pct = 3\n')
    said = refused("run", "s.toml", cwd=tmp_path)
    assert "s.toml, line 5, screen.min_top_pct" in said


def test_a_study_cannot_name_code(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text('[study]\nname = "s"\n[screen]\nmodels = ["os:getcwd"]\n')
    assert "command line" in refused("run", "s.toml", cwd=tmp_path)


def test_an_output_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "--out" in refused("run", "quickstart", "--out", str(tmp_path / "file" / "sub"))


MODELS = """
import sys
from torch import nn

class Tiny(nn.Sequential):
    num_classes = 4

def loud():
    print("a model that prints")
    return Tiny(nn.Conv2d(3, 4, 16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def leaves():
    sys.exit(3)
"""


def test_a_users_model_may_print_and_may_not_end_the_program(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODELS)
    done = edgejoule("zoo", "show", "mine:loud", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["name"] == "mine:loud"
    assert "a model that prints" in done.stderr
    assert "SystemExit" in refused("zoo", "show", "mine:leaves", cwd=tmp_path)


def test_reading_an_empty_file_leaves_it_empty(tmp_path: Path) -> None:
    (tmp_path / "t.csv").touch()
    assert "empty" in refused("report", "t.csv", cwd=tmp_path)
    assert (tmp_path / "t.csv").read_bytes() == b"" and len(list(tmp_path.iterdir())) == 1


def test_reproduce_prints_text_markdown_and_json() -> None:
    found = value("reproduce", "e3p")
    assert {"name", "title", "source", "sections", "disagreements", "counts"} <= set(found) and found["name"] == "e3p"
    names = {check["name"]: check for section in found["sections"] for check in section["checks"]}
    assert names["e3p.survivors"]["recomputed"] == "13" and names["e3p.survivors"]["verdict"] == "agrees"
    assert found["counts"]["disagrees"] == len(found["disagreements"])
    shown = edgejoule("reproduce", "e3p")
    assert shown.returncode == 0 and f"Disagreements: {len(found['disagreements'])}" in shown.stdout and "DISAGREES" in shown.stdout
    assert "LeViT_Conv_192" in shown.stderr  # what is being counted
    assert edgejoule("reproduce", "e3p", "--markdown").stdout.startswith("# Energy-Efficient Vision Transformer")


STUDY = """
[study]
name = "s"
[screen]
models = ['timm(name="test_vit")', "MobileNet-v3-0.75"]
[optimize]
recipes = ["", "fuse"]
[compile]
backends = ["torchscript"]
[[measure]]
profile = "quick(window_s=0.1, idle_s=0.05, warmup_s=0.05)"
meter = "none"
images = "photos(n=2)"
[rank]
metric = "latency"
beside = "edgevit_table2"
"""


@pytest.mark.study
def test_a_study_prints_its_latencies_beside_a_published_table_and_its_page_and_json_hold_them(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(STUDY)
    done = edgejoule("run", "s.toml", "--out", "out", "--cache", "cache", cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cpu_latency_mean_ms beside edgevit_table2") == 2
    assert done.stdout.count("order of 1 model: Spearman –") == 2 and "not in the printed table: test_vit" in done.stdout
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("Beside the published table") == 2 and "medians: fuse @ torchscript" in page
    again = value("run", "s.toml", "--out", "out", "--cache", "cache", cwd=tmp_path)
    assert [len(table["rows"]) for table in again["beside"]] == [18, 18]
    for table in again["beside"]:
        here = {row["model"]: row for row in table["rows"] if row["here"]}
        assert set(here) == {"MobileNet-v3 0.75"} and here["MobileNet-v3 0.75"]["paper"] == 23.0
    assert value("report", "out/results.sqlite", cwd=tmp_path)["beside"] == again["beside"]


TINY = 'timm(name="test_vit")'


def recipe_options(tmp_path: Path) -> tuple[str, ...]:
    return "--backend", "torchscript", "--recipe", "fuse", "--images", "photos(n=2)", "--cache", str(tmp_path / "cache")


def test_compile_takes_a_recipe_and_what_it_made_does_not(tmp_path: Path) -> None:
    made = value("compile", TINY, *recipe_options(tmp_path), "--out", str(tmp_path / "made"))["artifacts"][0]
    assert made["variant"]["recipe"] == "fuse" and made["parity"]["max_rel"] < 1e-4
    said = refused("measure", str(tmp_path / "made"), "--recipe", "fuse", "--meter", "none")
    assert "compiled already" in said and "leave --recipe out" in said


@pytest.mark.study
def test_measure_takes_a_recipe(tmp_path: Path) -> None:
    quick = ("--profile", "quick(window_s=0.1, idle_s=0.05, warmup_s=0.05)", "--meter", "none")
    found = value("measure", TINY, *recipe_options(tmp_path), *quick)
    assert found["variant"].startswith("test_vit.r160_in1k | fuse") and found["energy_j"] is None
    assert set(found["latency_s"]) == {"value", "low", "high", "n"}
