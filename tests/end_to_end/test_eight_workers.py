"""Eight processes, whatever the number of cores: they start, train and agree."""

from __future__ import annotations

import numpy as np
import pytest

from tests.end_to_end.test_main_job import launch


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_eight_workers_give_what_one_gives(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("eight")
    eight = launch(folder / "eight", 8)
    one = launch(folder / "one", 1)
    assert len(eight.result["rank_digests"]) == 8
    assert len(set(eight.result["rank_digests"])) == 1
    np.testing.assert_allclose(eight.losses, one.losses, rtol=0, atol=1e-5)
    for name, tensor in one.lora.items():
        np.testing.assert_allclose(eight.lora[name], tensor, rtol=0, atol=1e-5, err_msg=name)
