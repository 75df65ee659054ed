"""lm-evaluation-harness gives our models the scores that it gives the same checkpoints in transformers."""

from __future__ import annotations

import importlib.metadata
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'moe-surgery[lm-eval]'")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.evaluator import evaluate  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from moe_surgery import inspect, plan_random, prune  # noqa: E402
from moe_surgery.checkpoint.resolve import resolve  # noqa: E402
from moe_surgery.errors import UsageError  # noqa: E402
from moe_surgery.examples.skills import countries, documents, draw_questions  # noqa: E402
from moe_surgery.integrations.lm_eval import MoeSurgeryLM, main  # noqa: E402
from moe_surgery.runtime.generate import generate  # noqa: E402

pytestmark = [
    pytest.mark.xdist_group("integrations"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of datasets and multiprocess
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

CHOICE = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
GENERATE = """\
task: tiny_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: " {{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 12}}
metric_list: [{{metric: exact_match}}]
"""
ROLLING = """\
task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}]
"""
TASKS = ["tiny_choice", "tiny_generate", "tiny_rolling"]
F32_ERROR = 2e-4
"""Of a log-likelihood in nats, relative: both sides compute in float32, in another order."""
NATIVE_ERROR = 5e-3
"""The native backend rounds activations to 16-bit integers."""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three tasks over the bundled model's domains."""
    folder = tmp_path_factory.mktemp("tasks")
    draw = random.Random(0)
    rows = []
    for question in draw_questions("facts", 24, 0, held_out=True):
        key = next(k for k, v in countries()[0].items() if any(c[k] == question.answer for c in countries()))
        others = [c[key] for c in countries() if c[key] != question.answer]
        choices = [question.answer, *draw.sample(sorted(set(others)), 3)]
        draw.shuffle(choices)
        answer = choices.index(question.answer)
        rows.append({"question": question.prompt, "choices": choices, "answer": answer})
    write(folder / "choice.jsonl", rows)
    write(folder / "texts.jsonl", [{"text": text} for text in documents("python", 2, 5, questions=3)])
    for name, text in zip(TASKS, (CHOICE, GENERATE, ROLLING), strict=True):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory):
    """datasets keeps its copies in a folder of its own and asks no server."""
    import datasets.config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module", params=[None, 8], ids=["whole", "plan"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, str]]:
    """A checkpoint for transformers, and the arguments that make it ours: itself, or a plan of the whole."""
    if request.param is None:
        return resolve("example:tiny"), {"pretrained": "example:tiny"}
    folder = tmp_path_factory.mktemp("pruned")
    plan = plan_random(request.param, 3, inspect("example:tiny"))
    (folder / "plan.json").write_text(plan.to_json())
    prune("example:tiny", folder / "model", plan)
    return folder / "model", {"pretrained": "example:tiny", "plan": str(folder / "plan.json")}


def run(model: Any, tasks: Path) -> dict[str, Any]:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    results: dict[str, Any] = evaluate(model, manager.load(TASKS), bootstrap_iters=0)
    return results


@pytest.fixture(scope="module")
def expected(pair: tuple[Path, dict[str, str]], tasks: Path, offline: None) -> dict[str, Any]:
    """lm-eval's results of its `hf` model in float32."""
    model = HFLM(pretrained=str(pair[0]), dtype="float32", device="cpu", batch_size=8)
    return run(model, tasks)


def loglikelihoods(results: dict[str, Any]) -> list[float]:
    choice = [
        response[0] for sample in results["samples"]["tiny_choice"] for response in sample["filtered_resps"]
    ]
    rolling = [sample["filtered_resps"][0] for sample in results["samples"]["tiny_rolling"]]
    return [float(value) for value in (*choice, *rolling)]


@pytest.mark.parametrize(("backend", "error"), [("reference", F32_ERROR), (None, NATIVE_ERROR)])
def test_scores_are_those_of_the_hf_model(
    backend: str | None,
    error: float,
    pair: tuple[Path, dict[str, str]],
    tasks: Path,
    expected: dict[str, Any],
    offline: None,
) -> None:
    found = run(MoeSurgeryLM(**pair[1], dtype="float32", backend=backend, batch_size=8), tasks)
    assert loglikelihoods(found) == pytest.approx(loglikelihoods(expected), rel=error, abs=error)
    ours, theirs = found["results"], expected["results"]
    for key in ("acc,none", "acc_norm,none"):
        assert ours["tiny_choice"][key] == theirs["tiny_choice"][key]
    replies = [[s["filtered_resps"] for s in r["samples"]["tiny_generate"]] for r in (found, expected)]
    assert replies[0] == replies[1]
    assert ours["tiny_generate"]["exact_match,none"] == theirs["tiny_generate"]["exact_match,none"]
    perplexity = "word_perplexity,none"
    assert ours["tiny_rolling"][perplexity] == pytest.approx(
        theirs["tiny_rolling"][perplexity], rel=10 * error
    )
    if "plan" not in pair[1]:
        assert ours["tiny_choice"]["acc,none"] > 0.9  # what the model was trained on: 0.25 is chance


# --- the model itself


@pytest.fixture(scope="module")
def model() -> MoeSurgeryLM:
    return MoeSurgeryLM("example:tiny", dtype="float32", backend="reference", batch_tokens=64, max_length=48)


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, a, n) for n, a in enumerate(arguments)]


@pytest.fixture(scope="module")
def hf() -> HFLM:
    path = str(resolve("example:tiny"))
    return HFLM(pretrained=path, dtype="float32", device="cpu", batch_size=1, max_length=48)


def test_edge_cases_are_those_of_the_hf_model(model: MoeSurgeryLM, hf: HFLM) -> None:
    """No context, blanks at its end, more tokens than the context, and a text of several windows."""
    assert (model.eot_token_id, model.prefix_token_id) == (hf.eot_token_id, hf.prefix_token_id)
    long = "".join(documents("python", 3, 1))
    pairs = [("", "The number 12"), ("Answer: ", "5"), ("Answer:", " 5"), (long, " 12"), ("Spell", long[:60])]
    pairs += [("What is 3 + 4?", f" {n}") for n in range(6)]
    ours, theirs = (
        m.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True) for m in (model, hf)
    )
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], rel=F32_ERROR)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    texts = [(long,), ("One",)]
    rolled = [m.loglikelihood_rolling(instances("loglikelihood_rolling", *texts)) for m in (model, hf)]
    assert rolled[0] == pytest.approx(rolled[1], rel=F32_ERROR)


@pytest.mark.parametrize(
    "settings",
    [
        {"until": ["\n"], "max_gen_toks": 12},
        {"until": ["Question", "zz"], "max_gen_toks": 20},
        {"until": ["<|endoftext|>"], "max_gen_toks": 5, "do_sample": False},
    ],
)
@pytest.mark.parametrize("batch_size", [1, "auto"])
def test_generation_is_that_of_the_hf_model(
    settings: dict[str, Any], batch_size: object, model: MoeSurgeryLM, hf: HFLM
) -> None:
    prompts = [q.prompt for q in draw_questions("numbers", 4, 2, held_out=True)]
    prompts.append("".join(documents("facts", 1, 2)))  # longer than the context
    requests = instances("generate_until", *((prompt, dict(settings)) for prompt in prompts))
    model.batch_size = batch_size
    assert model.generate_until(requests, disable_tqdm=True) == hf.generate_until(requests, disable_tqdm=True)


def test_the_chat_template_is_applied_as_transformers_does(model: MoeSurgeryLM, hf: HFLM) -> None:
    history = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": " The answer is "},
    ]
    assert model.apply_chat_template(history[:2]) == hf.apply_chat_template(history[:2])
    continued = model.apply_chat_template(history, add_generation_prompt=False)
    assert continued == hf.apply_chat_template(history, add_generation_prompt=False)
    assert model.chat_template(True) == hf.chat_template(True)
    assert model.chat_template(False) is None


def test_variables_go_to_the_chat_template(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(resolve("example:tiny"), folder)
    template = "{{ effort }}: {% for m in messages %}{{ m['content'] | trim }};{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    arguments = {"chat_template_args": {"effort": "low"}}
    model = MoeSurgeryLM(str(folder), **arguments)
    hf = HFLM(pretrained=str(folder), dtype="float32", device="cpu", **arguments)
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So, "}]
    assert model.apply_chat_template(history[:1]) == hf.apply_chat_template(history[:1]) == "low: Hi;"
    begun = [m.apply_chat_template(history, add_generation_prompt=False) for m in (model, hf)]
    assert begun == ["low: Hi;So,"] * 2


def test_in_a_conversation_the_answer_counts_without_its_reasoning() -> None:
    """`until` ends the answer, not the reasoning before it."""
    model = MoeSurgeryLM("example:tiny")
    text = model._text
    prompt = model.apply_chat_template([{"role": "user", "content": "How do you write 47 in words?"}])
    assert text.parser(text.encode(prompt)).structured
    (plain,) = model.generate_until(instances("generate_until", (prompt, {"until": [], "max_gen_toks": 16})))
    ids = text.encode(prompt)
    (tokens,) = generate(model._whole, [ids], max_new_tokens=16).tokens
    assert plain == text.split(ids, tokens).answer
    (cut,) = model.generate_until(
        instances("generate_until", (prompt, {"until": [plain[1]], "max_gen_toks": 16}))
    )
    assert cut == plain[:1]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"dtype": "float12"}, "`dtype` float12: choose one of float32"),
        ({"batch_tokens": 0}, "`batch_tokens` 0"),
        ({"batch_size": "many"}, "`batch_size` many: must be at least 1, or auto"),
        ({"max_length": 10**9}, "`max_length` 1000000000: this model supports"),
        ({"top_k": 99}, "top"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        MoeSurgeryLM("example:tiny", **arguments)


def test_more_new_tokens_than_the_context_are_refused(model: MoeSurgeryLM) -> None:
    with pytest.raises(UsageError, match="`max_gen_toks` 48: the context is 48 tokens"):
        model.generate_until(instances("generate_until", ("x", {"until": [], "max_gen_toks": 48})))
    with pytest.raises(UsageError, match=r"continuation of .* tokens; the context is 48"):
        model.loglikelihood(instances("loglikelihood", ("x", "one two three " * 40)), disable_tqdm=True)


# --- as a program


@pytest.mark.slow  # lm-eval reads the settings of all its tasks
def test_the_program_is_lm_evals_with_this_model(
    tasks: Path,
    offline: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    arguments = ["run", "--model", "moe_surgery", "--model_args", "pretrained=example:tiny,dtype=float32"]
    arguments += ["--tasks", "tiny_choice", "--include_path", str(tasks), "--output_path", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
    main()
    assert "tiny_choice" in capsys.readouterr().out
    (results,) = tmp_path.rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["tiny_choice"]["acc,none"] > 0.9


def test_the_entry_point_names_the_class() -> None:
    """Of later versions of lm-eval, in the group `lm_eval.models`."""
    tomllib = pytest.importorskip("tomllib", reason="tomllib is part of Python from 3.11 on")
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    value = project["entry-points"]["lm_eval.models"]["moe_surgery"]
    point = importlib.metadata.EntryPoint("moe_surgery", value, "lm_eval.models")
    assert point.load() is MoeSurgeryLM
