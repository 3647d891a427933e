"""What a job says it costs, against counting."""

from __future__ import annotations

import subprocess
import sys

import pytest

from magmax.checkpoints import open_checkpoint
from magmax.merging.cost import ELEMENT_NS, JobCost, job_cost
from magmax.merging.merge_job import merge_job
from magmax.merging.output_options import OutputOptions
from magmax.rules import MagMax, make_rule


@pytest.mark.parametrize(("rule", "passes"), [("magmax", 1), ("ties", 4)])
def test_the_cost_of_a_job_is_what_its_passes_read_and_what_it_writes(files, tmp_path, rule, passes):
    base, models = files
    opened = [open_checkpoint(path) for path in [base, *models]]
    job = merge_job(make_rule(rule), opened[0], opened[1:], tmp_path / "m.safetensors", OutputOptions(dtype="bfloat16"))
    elements = sum(spec.numel for spec in opened[0].specs.values())
    cost = job_cost(job, threads=3)
    assert cost.elements == elements * (passes * 5 + 1)
    written = sum(s.nbytes for s in OutputOptions(dtype="bfloat16").out_specs(opened[0]).values())
    assert cost.disk_bytes == passes * sum(c.nbytes for c in opened) + written
    assert cost.threads == 3


def test_a_slow_disk_bounds_a_merge_and_a_fast_one_leaves_it_to_the_processors():
    cost = JobCost(disk_bytes=6_000_000_000, elements=3_000_000_000, threads=2)
    assert cost.seconds(100) == 60
    assert cost.seconds(1_000_000) == pytest.approx(3 * ELEMENT_NS / 2)
    assert all(cost.seconds(speed) >= cost.seconds(2 * speed) for speed in (10, 100, 1000, 10_000))


def test_a_dry_run_prints_the_time(files, tmp_path, monkeypatch, capsys):
    from magmax.cli import main

    base, models = files
    words = ["merge", "--base", str(base), str(models[0]), "--out", str(tmp_path / "m.safetensors"), "--dry-run"]
    monkeypatch.setattr("sys.argv", ["magmax", *words, "--threads", "1"])
    with pytest.raises(SystemExit):
        main()
    opened, model = open_checkpoint(base), open_checkpoint(models[0])
    cost = job_cost(merge_job(MagMax(), opened, [model], tmp_path / "m.safetensors", OutputOptions()), 1)
    assert f"time          about {cost.seconds(200):.2g} s at 200, " in capsys.readouterr().out


def test_nothing_of_networks_is_imported_before_a_url_asks_for_it():
    found = "import sys, magmax.cli, magmax.recipes.recipe; print({'fsspec', 'aiohttp', 's3fs'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", found], capture_output=True, text=True).stdout.strip() == "set()"
