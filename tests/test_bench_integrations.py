"""bench/integrations.py: what it times is compared first."""

import pytest
import torch

from bench import integrations


def test_rows_are_compared_and_timed():
    found = integrations.measured((1, 5, 4), 0.1)
    assert {"Alpamayo", "lerobot, Euler", "lerobot, Euler, grad mode", "openpi", "GR00T N1.7"} <= found.keys()
    for timings in found.values():
        assert all(0 < timing.low <= timing.median <= timing.high for timing in timings)
    lines = integrations.table(found).splitlines()
    assert len(lines) == 2 + len(found) and all(line.count("|") == 5 for line in lines)


@pytest.mark.parametrize(("eps", "wrong"), [
    (0.0, lambda x: torch.nextafter(x, x + 1)), (4.0, lambda x: x * (1 + 1e-5)), (4.0, lambda x: x.double()),
])  # fmt: skip
def test_a_result_that_differs(monkeypatch, capsys, eps, wrong):
    x = torch.rand(3) + 1
    monkeypatch.setattr(integrations, "rows", lambda shape: [integrations.Row("it", lambda: x, lambda: wrong(x), eps)])
    assert integrations.main(["--seconds", "0.1", "--shape", "3"]) == 1
    assert "it: " in capsys.readouterr().err
