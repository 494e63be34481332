"""The public names, pinned: a change here is a change for users."""

import edgejoule


def test_the_public_names() -> None:
    assert sorted(edgejoule.__all__) == [
        "EdgejouleError",
        "Measurement",
        "ModelSpec",
        "Ranking",
        "Store",
        "Study",
        "Trial",
        "__version__",
        "find_model",
        "load_study",
        "meter",
        "run_study",
    ]
    assert all(getattr(edgejoule, name) is not None for name in edgejoule.__all__)
