"""The command line, as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.models import load_tensors, same_bytes, save_tensors, small_model

import magmax
from magmax import MagMaxError, cli
from magmax.checkpoints.journal import WorkingFolder, lock_folder
from magmax.cli import console
from magmax.recipes.recipe import load_recipe
from magmax.rules import BUILT_IN


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command line in this process; returns (exit code, stdout, stderr)."""

    def command(*words: object):
        monkeypatch.setattr(sys, "argv", ["magmax", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return command


def test_merge_writes_what_the_library_merges(run, files, tmp_path):
    base, tasks = files
    code, out, _ = run("merge", "--base", base, *tasks, "--out", tmp_path / "cli.safetensors")
    library = magmax.merge("magmax", base, tasks, out=tmp_path / "library.safetensors")
    assert code == 0
    assert "merged 4 models with magmax" in out
    assert "position_ids: I64 is not merged" in out
    assert (tmp_path / "cli.safetensors").read_bytes() == library.read_bytes()


def test_models_may_be_named_as_an_option(run, files, tmp_path):
    base, tasks = files
    for name, words in {"a": [*tasks], "b": ["--models", *tasks]}.items():
        assert run("merge", "--base", base, *words, "--out", tmp_path / f"{name}.safetensors")[0] == 0
        prefer = ["--prefer", f"{tasks[0].stem}=3", "--prefer", f"{tasks[1].stem}=1"]
        assert run("tune", "--base", base, *words, *prefer, "--out", tmp_path / f"tuned-{name}.safetensors")[0] == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert (tmp_path / "tuned-a.safetensors").read_bytes() == (tmp_path / "tuned-b.safetensors").read_bytes()


def test_tune_takes_the_remedies_that_its_errors_name(run, tmp_path):
    base = {"a": torch.zeros(6), "b": torch.zeros(2)}
    tasks = {
        "one": {**base, "a": torch.arange(6.0)},
        "two": {"a": -torch.arange(6.0)},
        "odd": {**base, "a": torch.ones(6) * torch.nan},
    }
    files = {
        name: save_tensors(tensors, tmp_path / f"{name}.safetensors")
        for name, tensors in {"base": base, **tasks}.items()
    }
    words = ["tune", "--base", files["base"], "--out", tmp_path / "out.safetensors", "--prefer", "one=1"]
    for other, remedy in (("two", ["--mismatch", "base"]), ("odd", ["--allow-nonfinite"])):
        given = [*words, "--prefer", f"{other}=1", files["one"], files[other]]
        code, _, err = run(*given)
        assert code == 2
        assert " ".join(remedy) in err
        assert run(*given, *remedy)[0] == 0


def test_a_rule_with_options_and_assignments(run, files, tmp_path):
    base, tasks = files
    words = ["--base", base, *tasks, "--out", tmp_path / "a.safetensors", "--scaling-factor", "0.7"]
    assert run("merge", *words, "--rule", "kth_magnitude", "rule.k=2")[0] == 0
    words[-3] = tmp_path / "b.safetensors"
    assert run("merge", *words, "--rule", "{kth_magnitude: {k: 2}}")[0] == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_recipe_with_assignments_and_flags(run, files, tmp_path):
    base, tasks = files
    recipe = tmp_path / "in" / "recipe.yaml"
    recipe.write_text(f"base: {base.name}\nmodels: [{', '.join(t.name for t in tasks)}]\nout: ../one.safetensors\n")
    assert run("merge", recipe, "scaling_factor=0.7")[0] == 0
    assert run("merge", recipe, "--scaling-factor", "0.7", "--out", tmp_path / "two.safetensors")[0] == 0
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_a_dry_run_prints_the_cost_and_writes_nothing(run, files, tmp_path):
    base, tasks = files
    before = sorted(p.name for p in tmp_path.rglob("*"))
    code, out, _ = run("merge", "--base", base, *tasks, "--out", tmp_path / "out.safetensors", "--dry-run")
    assert code == 0
    for word in ("passes        1", "bytes to read", "bytes written", "disk needed", "peak memory", "no problem found"):
        assert word in out
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_a_device_is_worked_on_or_refused_before_anything_is_done(run, files, tmp_path):
    base, tasks = files
    words = ("merge", "--base", base, *tasks, "--out", tmp_path / "out.safetensors", "--device")
    code, _, err = run(*words, "cuda:99", "--dry-run")
    assert code == 2
    assert "cuda:99: torch" in err
    assert run(*words, "cpu")[0] == 0
    assert same_bytes(
        load_tensors(tmp_path / "out.safetensors"),
        load_tensors(magmax.merge("magmax", base, tasks, out=tmp_path / "b.safetensors")),
    )


def test_a_dry_run_reports_problems_with_exit_code_2(run, files, tmp_path):
    base, tasks = files
    code, _, err = run("merge", "--base", base, *tasks, "--out", tasks[0], "--dry-run")
    assert code == 2
    assert "is one of the inputs" in err


def test_the_rules_are_listed_with_their_passes_and_memory(run):
    code, out, _ = run("recipes", "rules")
    rows = {line.split()[0]: line for line in out.splitlines()[1 : 1 + len(BUILT_IN)]}
    assert code == 0
    assert list(rows) == list(BUILT_IN)
    assert " 0 " in rows["iso_c"]
    assert "a tensor a model" in rows["iso_c"]
    assert "t=0.5" in rows["slerp"]
    assert all("a block a model" in rows[name] for name in ("slerp", "consensus", "nearswap", "ties"))
    assert "a model" not in rows["magmax"]


def test_a_dry_run_says_that_tensors_are_held_whole(run, files, tmp_path):
    base, tasks = files
    words = ["merge", "--base", base, *tasks, "--out", tmp_path / "x.safetensors", "--dry-run"]
    assert "a tensor of every model" in run(*words, "--rule", "tsv_m")[1]
    assert "a tensor of every model" not in run(*words, "--rule", "ties")[1]


def test_absorb_status_result_label_restore(run, files, tmp_path):
    base, tasks = files
    state = tmp_path / "state"
    assert run("running", "absorb", state, tasks[0], "--base", base, "--winners")[0] == 0
    assert run("running", "absorb", state, tasks[1], "--name", "second", "--label", "two")[0] == 0
    assert run("running", "absorb", state, tasks[2])[0] == 0
    code, out, _ = run("running", "status", state)
    assert code == 0
    for word in ("rule   magmax", "second", "3 (current)", "two", "%"):
        assert word in out
    assert run("running", "result", state, "--out", tmp_path / "ours.safetensors")[0] == 0
    theirs = magmax.merge("magmax", base, tasks[:3], out=tmp_path / "theirs.safetensors")
    assert same_bytes(load_tensors(tmp_path / "ours.safetensors"), load_tensors(theirs))
    code, out, _ = run("running", "restore", state, "two")
    assert code == 0
    assert "kept version 3" in out
    assert "labelled 'left-3'" in out
    assert "left-3" in run("running", "status", state)[1]
    assert run("running", "label", state, "again")[0] == 0
    assert "again" in run("running", "status", state)[1]


@pytest.mark.parametrize("verb", ["status", "label", "restore", "result"])
def test_a_folder_that_is_no_state_is_refused_and_not_made(verb, run, tmp_path):
    words = {"label": ["x"], "restore": ["x"], "result": ["--out", tmp_path / "o.safetensors"]}.get(verb, [])
    code, _, err = run("running", verb, tmp_path / "nowhere", *words)
    assert code == 2
    assert "is not a running merge" in err
    assert not (tmp_path / "nowhere").exists()


def test_inspect_shows_tensors_and_provenance(run, files, tmp_path):
    base, tasks = files
    run("merge", "--base", base, *tasks, "--out", tmp_path / "out.safetensors")
    _, out, _ = run("checkpoint", "inspect", tmp_path / "out.safetensors")
    for word in ("embed.weight", "130x24", "F32", '"magmax"', "task4"):
        assert word in out
    told = json.loads(run("checkpoint", "inspect", tmp_path / "out.safetensors", "--json")[1])
    assert told["tensors"]["layer.weight"] == {"dtype": "F32", "shape": [48, 33], "bytes": 48 * 33 * 4}
    assert told["provenance"]["recipe"]["scaling_factor"] == 0.5
    assert "provenance: none" in run("checkpoint", "inspect", base)[1]


def test_diff_measures_the_task_vector(run, tmp_path):
    start, end = small_model(0), small_model(1)
    end["layer.bias"] = start["layer.bias"].clone()
    end["extra"] = end["scale"].clone()
    base, model = save_tensors(start, tmp_path / "base.safetensors"), save_tensors(end, tmp_path / "model.safetensors")
    told = json.loads(run("checkpoint", "diff", base, model, "--json")[1])
    norms = {m["key"]: m["norm"] for m in told["tensors"]}
    for key in ("embed.weight", "wide.weight"):
        assert norms[key] == pytest.approx((end[key].double() - start[key].double()).norm().item(), rel=1e-12)
    assert norms["layer.bias"] == 0
    _, out, _ = run("checkpoint", "diff", base, model, "--limit", "1")
    assert "wide.weight" in out
    assert "embed.weight" not in out
    assert "not compared" in out
    assert "extra" in out


def test_sweep_writes_each_result_or_scores_it(run, files, tmp_path):
    base, tasks = files
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: {base}\nmodels: [{', '.join(map(str, tasks))}]\nout: merged.safetensors\n")
    code, out, _ = run("search", "sweep", recipe, "scaling_factor=0.5:1.0:0.5")
    assert code == 0
    assert "merged-0.5.safetensors" in out
    assert same_bytes(
        load_tensors(tmp_path / "merged-1.safetensors"),
        load_tensors(magmax.merge("magmax", base, tasks, 1.0, tmp_path / "m.safetensors")),
    )
    score = tmp_path / "score.py"
    score.write_text("import os, sys\nprint('some words')\nprint(os.path.getsize(sys.argv[1]))\n")
    code, out, _ = run("search", "sweep", recipe, "scaling_factor=0.2,0.4", "--eval", f"{sys.executable} {score}")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["scaling_factor", "0.2", "0.4"]
    assert not list(tmp_path.glob("merged-0.2*"))
    code, _, err = run("search", "sweep", recipe, "scaling_factor=0.2", "--eval", "false")
    assert code == 2
    assert "exit code 1" in err
    assert not list(tmp_path.glob("merged-0.2*"))
    assert not list(tmp_path.glob("*task-vector*"))


def test_tuning_from_models_from_an_archive_and_by_a_preset(run, files, tmp_path):
    base, tasks = files
    words = ["tune", "--base", base, *tasks, "--prefer", "task1=3", "--prefer", "task3=1"]
    code, out, err = run(*words, "--out", tmp_path / "a.safetensors")
    assert code == 0
    assert "from each: task1 75.0%, task2 0.0%, task3 25.0%, task4 0.0%" in out
    assert "no choice could exceed" in err
    rule = "{tunable: {preference: {task3: 1, task1: 3}}}"
    run("merge", "--base", base, *tasks, "--rule", rule, "--out", tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    archive = tmp_path / "archive"
    code, out, _ = run("archive", "create", "--base", base, *tasks, "--out", archive, "--density", "1", "--bits", "32")
    assert code == 0
    assert "archived task1, task2, task3, task4" in out
    words = ["tune", "--archive", archive, "--prefer", "task1=3", "--prefer", "task3=1", "--save", "mine"]
    assert run(*words, "--out", tmp_path / "c.safetensors")[0] == 0
    assert run("tune", "--archive", archive, "--preset", "mine", "--out", tmp_path / "d.safetensors")[0] == 0
    for name in "cd":
        assert same_bytes(load_tensors(tmp_path / f"{name}.safetensors"), load_tensors(tmp_path / "a.safetensors"))
    assert run("archive", "presets", archive)[1].splitlines()[1].split() == ["mine", "3", "0", "1", "0"]
    code, _, err = run("tune", "--archive", archive, "--preset", "mine", "--out", archive / "x.safetensors")
    assert code == 2
    assert "inside it; choose another place" in err
    assert run("archive", "presets", archive)[0] == 0
    code, _, err = run("archive", "create", "--base", base, *tasks[::-1], "--out", archive)
    assert code == 2
    assert "holds presets (mine) for other models" in err


def test_a_preset_gives_the_bytes_of_the_run_that_saved_it(run, tmp_path):
    """Weights 1 and 5 of nine elements tie in the largest remainders; rounded shares do not."""
    draw = torch.Generator().manual_seed(0)
    paths = [
        save_tensors({"w": torch.randn(9, generator=draw)}, tmp_path / f"{name}.safetensors")
        for name in ("b", "x", "y")
    ]
    archive = tmp_path / "archive"
    assert run("archive", "create", "--base", *paths, "--out", archive, "--density", "1", "--bits", "32")[0] == 0
    words, given = ["tune", "--archive", archive], ["--prefer", "x=1", "--prefer", "y=5", "--save", "mine"]
    assert run(*words, *given, "--out", tmp_path / "saved.safetensors")[0] == 0
    assert json.loads((archive / "archive.json").read_text())["presets"] == {"mine": {"x": 1, "y": 5}}
    assert run(*words, "--preset", "mine", "--out", tmp_path / "again.safetensors")[0] == 0
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "saved.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prefer", "task1"], "needs NAME=WEIGHT"),
        (["--prefer", "task1=much"], "needs NAME=WEIGHT"),
        (["--prefer", "task1=1", "--prefer", "task1=2"], "twice"),
        (["--prefer", "tsk1=1"], "did you mean 'task1'"),
        (["--prefer", "task1=-1"], "0 or more"),
        (["--prefer", "task1=0"], "all of these are 0"),
        ([], "tune needs --prefer"),
        (["--preset", "x"], "need --archive"),
        (["--target", "t.csv"], "go together"),
        (["--archive", "a", "--prefer", "a=1"], "tune needs --base BASE and the models, or --archive"),
    ],
)
def test_what_cannot_be_tuned_writes_nothing(words, message, run, files, tmp_path):
    base, tasks = files
    code, _, err = run("tune", "--base", base, *tasks, "--out", tmp_path / "o.safetensors", *words)
    assert (code, message in err) == (2, True)
    assert not (tmp_path / "o.safetensors").exists()


def test_a_sweep_never_touches_what_is_there(run, files, tmp_path):
    base, tasks = files
    kept = save_tensors(small_model(7), tmp_path / "m-1.safetensors")
    before = kept.read_bytes()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: {base}\nmodels: [{kept}, {tasks[0]}]\nout: m.safetensors\n")
    code, _, err = run("search", "sweep", recipe, "scaling_factor=1,2")
    assert (code, "is one of the inputs" in err) == (2, True)
    recipe.write_text(f"base: {base}\nmodels: [{tasks[0]}]\nout: m.safetensors\n")
    code, _, err = run("search", "sweep", recipe, "scaling_factor=1,2", "--eval", "true")
    assert (code, "is there already" in err) == (2, True)
    assert kept.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["merge", "a.safetensors"], "needs --base"),
        (["merge", "--base", "nowhere.safetensors", "b.safetensors", "--out", "o.safetensors"], "no such file"),
        (["merge", "--bass", "x"], "--bass"),
        (["merge", "--base", "b", "--dtype", "int4"], "int4"),
        (["checkpoint", "inspect", "nowhere"], "no such file"),
        (["search", "sweep", "r.yaml"], "needs one range"),
        (["mrge"], "mrge"),
    ],
)
def test_bad_words_end_with_exit_code_2(words, message, run):
    code, out, err = run(*words)
    assert code == 2
    assert message in out + err


def test_help_is_quick_to_come_because_nothing_heavy_is_imported():
    heavy = "('torch', 'numpy', 'pydantic', 'transformers')"
    script = f"import sys; from magmax import cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_merging_safetensors_needs_no_torch(files, tmp_path):
    base, tasks = files
    hidden = (
        "import sys; sys.modules['torch'] = None; sys.modules['safetensors'] = None\n"
        "from magmax import cli; cli.main()\n"
    )
    words = ["merge", "--base", base, *tasks, "--out", tmp_path / "out.safetensors"]
    subprocess.run([sys.executable, "-c", hidden, *map(str, words)], check=True, capture_output=True)
    assert same_bytes(
        load_tensors(tmp_path / "out.safetensors"),
        load_tensors(magmax.merge("magmax", base, tasks, out=tmp_path / "o.safetensors")),
    )


@pytest.mark.parametrize("extras", [(), ("report", "sweep"), ("cluster", "data", "hub", "remote")], ids=" ".join)
def test_commands_work_with_the_extras_that_they_need_alone(extras, tmp_path):
    """With the packages of all other extras blocked; and what needs one of these names it. The list is the tool's."""
    tool = str(Path(__file__).parents[1] / "tools" / "try_extras.py")
    done = subprocess.run(
        [sys.executable, tool, "--block", "--inside", str(tmp_path), *extras], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize("words", ["merge --base base a --out o", "recipes check base", "report base --out o.html"])
def test_an_interruption_says_what_is_left_of_the_work(words, run, tmp_path, monkeypatch):
    def interrupt(*given, **options):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    for place in ("recipes.recipe.build_request", "recipes.recipe.load_recipe", "analysis.run_folders.load_results"):
        monkeypatch.setattr(f"magmax.{place}", interrupt)
    code, out, err = run(*words.split())
    assert (code, out) == (130, "")
    resumes = "interrupted; what is finished is kept, and the same command goes on from there\n"
    assert err == (resumes if words.startswith("merge") else "interrupted\n")


COMMANDS = [
    *("merge", "search", "search sweep", "search run", "calibrate"),
    *("checkpoint", "checkpoint inspect", "checkpoint diff", "checkpoint convert"),
    *("running", "running absorb", "running result", "running status", "running label", "running restore"),
    *("tune", "archive", "archive create", "archive presets", "ui"),
    *("train", "eval", "bench", "study", "study environments", "report"),
    *("recipes", "recipes list", "recipes copy", "recipes check", "recipes rules"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_can_be_quiet(command, run):
    code, out, _ = run(*command.split(), "--help")
    assert code == 0
    assert "Usage: magmax " + command in out
    assert "--quiet" in out


def test_the_top_level_has_fourteen_commands_in_seven_groups(run):
    names = [name for name in cli.app if not name.startswith("-")]
    assert sorted(names) == sorted(command for command in COMMANDS if " " not in command)
    assert len(names) == 14
    out = run("--help")[1]
    groups = ["Merge", "Checkpoints", "Running merge", "Tunable", "Continual learning", "Analysis", "Reference"]
    places = [out.index(f" {group} \u2500") for group in groups]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("words", "new"),
    [
        ("sweep recipe.yaml", "magmax search sweep"),
        ("search search.yaml", "magmax search run"),
        ("absorb state model", "magmax running absorb"),
        ("result state", "magmax running result"),
        ("status state", "magmax running status"),
        ("label state x", "magmax running label"),
        ("restore state x", "magmax running restore"),
        ("inspect model", "magmax checkpoint inspect"),
        ("diff base model", "magmax checkpoint diff"),
        ("convert old new", "magmax checkpoint convert MODEL --out OUT"),
        ("rules", "magmax recipes rules"),
        ("archive a b --base c", "magmax archive create"),
        ("presets archive", "magmax archive presets"),
        ("environments study.yaml", "magmax study environments"),
        ("recipes ls", "magmax recipes list"),
        ("recipes cp magmax", "magmax recipes copy NAME --out FILE"),
        ("train recipe.yaml --out run --chain ewc", "--training"),
        ("search sweep recipe.yaml --keep", "--keep-results"),
        ("archive create a --base b --out c --top=0.3", "--density"),
        ("study conflicts a b --base c --top 0.3", "--density"),
        ("checkpoint diff base model --top 3", "--limit"),
    ],
)
def test_an_old_name_is_refused_with_the_new_one(words, new, run):
    code, out, err = run(*words.split())
    assert (code, out) == (2, "")
    assert new in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("option", ["--quiet", "-q"])
def test_quiet_commands_print_results_and_errors_alone(option, run, files, tmp_path):
    _, tasks = files
    recipe = tmp_path / "theirs.yaml"
    recipe.write_text(
        f"merge_method: linear\nmodels:\n  - {{model: {tasks[0]}, parameters: {{weight: 1, density: 0.5}}}}\n"
        "dtype: float32\n"
    )
    words = ("merge", recipe, "--out", tmp_path / "out.safetensors")
    assert "note: " in run(*words)[2]
    code, out, err = run(*words, option)
    assert (code, err) == (0, "")
    assert "merged 1 models" in out
    assert "no such file" in run("checkpoint", "inspect", tmp_path / "nowhere", option)[2]


def test_what_is_printed_as_a_table_is_printed_as_json_too(run, files, tmp_path):
    base, tasks = files
    state, archive = tmp_path / "state", tmp_path / "archive"
    assert run("running", "absorb", state, tasks[0], "--base", base, "--name", "cars")[0] == 0
    assert json.loads(run("running", "status", state, "--json")[1])["current"]["tasks"][0]["name"] == "cars"
    assert run("archive", "create", "--base", base, *tasks, "--out", archive)[0] == 0
    assert json.loads(run("archive", "presets", archive, "--json")[1])["presets"] == {}
    assert "magmax" in json.loads(run("recipes", "list", "--json")[1])
    assert json.loads(run("recipes", "rules", "--json")[1])[0]["name"] == "magmax"


def test_inputs_are_never_changed(run, files, tmp_path):
    base, tasks = files
    before = [Path(p).read_bytes() for p in (base, *tasks)]
    run("merge", "--base", base, *tasks, "--out", tmp_path / "out.safetensors")
    run("running", "absorb", tmp_path / "state", tasks[0], "--base", base)
    assert [Path(p).read_bytes() for p in (base, *tasks)] == before


def test_a_study_and_a_report_keep_others_from_their_output(run, files, tmp_path):
    base, tasks = files
    page, folder = tmp_path / "page.html", tmp_path / "studies"
    for words, out in ((["report", *tasks[:2]], page), (["study", "norms", *tasks[:2]], folder)):
        folder.mkdir(exist_ok=True)
        with WorkingFolder(page), lock_folder(folder):
            code, _, said = run(*words, "--base", base, "--out", out)
        assert (code, said) == (2, f"error: {out}: another magmax is writing this output; wait for it to end\n")
        assert run(*words, "--base", base, "--out", out)[0] == 0
    assert {path.name for path in tmp_path.glob("*")} >= {"page.html", "studies"}
    assert not list(tmp_path.rglob("*magmax*"))


@pytest.mark.parametrize("kind", ["link", "folder", "hard link"])
def test_a_page_and_a_table_take_no_place_of_anything_else(kind, run, files, tmp_path):
    base, tasks = files
    victim, folder = tmp_path / "victim", tmp_path / "studies"
    victim.write_text("precious")
    folder.mkdir()
    places = {"report": tmp_path / "page.html", "study": folder / "norms.csv"}
    for place in places.values():
        if kind == "folder":
            place.mkdir()
        else:
            place.symlink_to(victim) if kind == "link" else place.hardlink_to(victim)
    for verb, out in (("report", [places["report"]]), ("study", [folder])):
        code, _, said = run(verb, *(["norms"] if verb == "study" else []), *tasks[:2], "--base", base, "--out", *out)
        assert code == (0 if kind == "hard link" else 2), said
        assert victim.read_text() == "precious"
        assert str(places[verb]) in said or not code
    assert all(path.is_symlink() == (kind == "link") for path in places.values())


def test_a_count_of_problems_counts_no_hints(tmp_path):
    base, model = ({f"a.{n}{end}": torch.zeros(1) for n in range(60)} for end in ("", ".x"))
    with pytest.raises(MagMaxError) as caught:
        magmax.merge("magmax", base, [model])
    lines = str(caught.value).splitlines()
    assert "(120 problems)" in lines[0]
    assert len(lines) < 60
    assert "... and 80 more" in lines[-3]
    with pytest.raises(MagMaxError) as caught:
        magmax.merge("magmax", base, [{**base, "b": torch.zeros(1)}])
    assert "problems" not in str(caught.value)


def test_a_rule_that_is_none_is_told_from_transforms():
    with pytest.raises(MagMaxError, match=r"choose from: average, .*; before or after one of these: prune, dare"):
        magmax.merge("zzzz", {}, [])


def test_a_recipe_that_is_not_there_is_called_so(tmp_path):
    with pytest.raises(MagMaxError, match="there is no such file"):
        load_recipe(str(tmp_path / "no.yaml"))


def test_the_progress_bar_does_not_pass_its_end(monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with console._progress_bar(10, "merging") as advance:
        for _ in range(3):
            advance(5)
        bar = advance.__closure__ and next(
            cell.cell_contents for cell in advance.__closure__ if hasattr(cell.cell_contents, "tasks")
        )
        assert (bar.tasks[0].completed, bar.tasks[0].total) == (15, 15)
