"""The catalog: complete, unique, true to timm's preprocessing, and forgiving of how users write names."""

from __future__ import annotations

import csv
import importlib.resources
import io
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgejoule.catalog import find_model, pool, rows
from edgejoule.errors import EdgejouleError, ModelError, SpecError, UnknownNameError
from edgejoule.registry import canonical, create, parse

SURVIVORS = [
    "efficientvit_b1", "levit_192", "levit_conv_192", "tiny_vit_5m", "tiny_vit_5m_distilled", "tiny_vit_11m", "tiny_vit_11m_distilled",
    "poolformerv2_s24", "tiny_vit_21m", "tiny_vit_21m_distilled", "vit_small", "deit_small", "deit_small_distilled",
]  # fmt: skip
REJECTED = [
    "vit_tiny", "vit_base", "deit_tiny", "deit_tiny_distilled", "deit_base", "deit_base_distilled", "efficientvit_b0",
    "efficientvit_b2", "efficientvit_b3", "poolformerv2_s12", "poolformerv2_s36", "levit_384",
]  # fmt: skip


def fold(name: str) -> str:
    return name.casefold().replace("-", "_")


def test_the_pools_are_pinned() -> None:
    assert {spec.name for spec in pool("e3p")} == {*SURVIVORS, *REJECTED} and len(pool("e3p")) == 25
    assert len(pool("edgevit")) == 20 and len(pool("edgevit_coco")) == len(pool("edgevit_ade20k")) == 7
    families = {spec.family for spec in pool("guide")}
    assert families >= {
        "MobileViT", "MobileViTv2", "EfficientViT (MIT)", "EfficientViT (MSRA)", "LeViT", "TinyViT", "Swin", "PVTv2", "DeiT",
        "EfficientFormerV2", "FastViT", "EdgeNeXt", "RepViT", "SwiftFormer", "MobileNetV4",
    }  # fmt: skip
    with pytest.raises(UnknownNameError, match="e3p"):
        pool("e3q")


def test_every_name_and_alias_means_one_model() -> None:
    owners: dict[str, str] = {}
    for spec in rows():
        for name in {fold(name) for name in (spec.name, *spec.aliases)}:
            assert name not in owners, f"{name} is both {owners[name]} and {spec.name}"
            owners[name] = spec.name
    for name, owner in owners.items():
        assert find_model(name.upper()).name == owner


def test_every_row_is_complete() -> None:
    for spec in rows():
        published = spec.published
        assert published is not None and published.params_m and published.macs_g, spec.name
        assert re.search(r"@[0-9a-f]{7,8}|arXiv", published.source), spec.name
        assert published.top1_pct is not None or spec.name in ("mobilenetv3_large_075", "edgevit_xs_paper", "edgevit_s_paper")
        dense = spec.family == "backbone"
        assert spec.licence and (dense or spec.num_classes == 1000) and (dense or spec.dataset == "imagenet-1k")
        assert not dense or ("mIoU" in spec.dataset) != ("AP" in spec.dataset)
        assert canonical(spec.builder) == canonical(str(parse(spec.builder)))


def test_a_distilled_model_names_its_plain_twin() -> None:
    twins = {spec.name: spec.plain for spec in rows() if spec.plain}
    assert twins["tiny_vit_11m_distilled"] == "tiny_vit_11m" and twins["deit_small_distilled"] == "deit_small"
    for distilled, plain in twins.items():
        a, b = find_model(distilled), find_model(plain)
        assert b.name == plain and not b.plain
        assert a.preprocessing == b.preprocessing and a.published and b.published
        assert (a.published.top1_pct or 0) > (b.published.top1_pct or 0)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("ViT_S", "vit_small"),
        ("DeiT_Ti", "deit_tiny"),
        ("TinyViT-11M_Distilled", "tiny_vit_11m_distilled"),
        ("LeViT_Conv_192", "levit_conv_192"),
        ("EfficientViT-B1", "efficientvit_b1"),
        ("PoolFormerV2_S24", "poolformerv2_s24"),
        ("vit_small_patch16_224", "vit_small"),
        ("levit_conv_192.fb_dist_in1k", "levit_conv_192"),
        ("MobileNet-v2", "mobilenetv2_100"),
        ("MobileNet-v3 0.75", "tf_mobilenetv3_large_075"),
        ("EdgeViT-XXS", "edgevit_xxs"),
        ("PVTv1-Tiny", "pvt_v1_tiny"),
        ('timm(name="edgevit_s")', "edgevit_s"),
        ('backbone(size=800, name="edgevit_s")', "edgevit_s_coco"),
        (' timm(name="levit_conv_192.fb_dist_in1k") ', "levit_conv_192"),
        ('timm(name="vit_small_patch16_224")', "vit_small"),
        ('timm(name="mobilenetv3_large_075")', "mobilenetv3_large_075"),
    ],
)
def test_names_as_users_and_papers_write_them(written: str, meant: str) -> None:
    assert find_model(written).name == meant


def test_a_wrong_name_offers_the_nearest() -> None:
    with pytest.raises(UnknownNameError) as caught:
        find_model("levit_conv_129")
    assert "levit_conv_128" in caught.value.nearest
    with pytest.raises(UnknownNameError, match=r"(?i)levit.conv.192"):
        find_model("LeViT_Conv_193")
    import edgejoule.zoo  # noqa: F401  timm is loaded from here on, and its names are offered too

    with pytest.raises(UnknownNameError, match=r'timm\(name="levit_conv_512"\)'):
        find_model("levit_conv_512")
    with pytest.raises(UnknownNameError, match="vit_tiny_patch16_224"):
        find_model('timm(name="vit_tny_patch16_224")')
    with pytest.raises(UnknownNameError, match="fb_dist_in1k"):
        find_model('timm(name="levit_192.fb_dist")')


def test_any_other_timm_model_comes_with_timms_preprocessing() -> None:
    spec = find_model('timm(name="test_vit.r160_in1k")')
    assert spec.published is None and spec.preprocessing.input_size == (3, 160, 160) and spec.builder == 'timm(name="test_vit.r160_in1k")'
    assert spec.licence == "apache-2.0" and spec.num_classes == 1000
    with pytest.raises(SpecError, match="no option"):
        find_model('timm(name="test_vit", pretrained=True)')
    with pytest.raises(SpecError, match="needs name"):
        find_model("timm()")


def test_code_is_taken_only_where_it_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_of_catalog_test.py").write_text(
        textwrap.dedent("""
        import torch
        def network(num_classes=7):
            module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, num_classes))
            module.default_cfg = {"input_size": (3, 8, 8), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "num_classes": 7}
            return module
        def plain(): return torch.nn.Identity()
        def wrong(): return 3
        def failing(): return 1 / 0
        """)
    )
    monkeypatch.chdir(tmp_path)
    for text in ("mine_of_catalog_test:network", 'custom(target="mine_of_catalog_test:network")'):
        with pytest.raises(SpecError, match="never from a study file"):
            find_model(text)
        spec = find_model(text, allow_code=True)
        assert spec.preprocessing.input_size == (3, 8, 8) and spec.preprocessing.mean == (0.5, 0.5, 0.5) and spec.num_classes == 7
    assert "mine_of_catalog_test" in sys.modules
    assert find_model("mine_of_catalog_test:plain", allow_code=True).preprocessing.input_size == (3, 224, 224)
    with pytest.raises(ModelError, match="returned int"):
        find_model("mine_of_catalog_test:wrong", allow_code=True)
    with pytest.raises(ModelError, match="ZeroDivisionError"):
        find_model("mine_of_catalog_test:failing", allow_code=True)
    with pytest.raises(SpecError, match="has no 'absent'"):
        find_model("mine_of_catalog_test:absent", allow_code=True)
    with pytest.raises(SpecError, match="cannot import"):
        find_model("no_such_module_anywhere:f", allow_code=True)


@given(st.one_of(st.text(max_size=40), st.from_regex(r"timm\(.{0,20}\)", fullmatch=True)))
@settings(max_examples=150, deadline=None)
def test_any_text_is_a_model_or_a_clear_error(text: str) -> None:
    try:
        find_model(text)
    except EdgejouleError as error:
        assert str(error)


def test_preprocessing_is_timms_own_for_every_row() -> None:
    for spec in rows():
        timms = create("model", spec.builder).spec()
        assert spec.preprocessing == timms.preprocessing, spec.name
        assert (spec.num_classes, spec.licence) == (timms.num_classes, timms.licence), spec.name


def test_every_model_of_the_papers_tables_has_a_row() -> None:
    for number, among in ((2, "edgevit"), (3, "edgevit"), (7, "edgevit"), (8, "edgevit")):
        table = importlib.resources.files("edgejoule") / "published" / f"edgevit_table{number}.csv"
        for row in csv.DictReader(io.StringIO(table.read_text(encoding="utf-8"))):
            assert among in find_model(row["model"]).pools, row["model"]


def test_the_catalog_needs_no_torch() -> None:
    script = "import sys, edgejoule.catalog as c; c.find_model('vit_small'); assert not {'torch', 'timm', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
