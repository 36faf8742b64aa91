"""The docstrings demo: its classes, its texts, its student, and a tiny run from end to end with stand-ins."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from tgt_fast import cli
from tgt_fast.demos import command
from tgt_fast.demos.artifacts import Artifacts
from tgt_fast.demos.catalog import DEMOS, Demo
from tgt_fast.demos.corpus import Corpus, Entry
from tgt_fast.demos.docstrings import data, findings, models, page, pool, results, run, settings, teachers, tune
from tgt_fast.demos.docstrings.methods import Labelled, train_student
from tgt_fast.demos.docstrings.results import DemoResult
from tgt_fast.demos.docstrings.settings import METHODS, Settings
from tgt_fast.demos.text import generator, sentences, vocabulary
from tgt_fast.demos.text.generator import MASK, PAD, SEP, GeneratorSettings
from tgt_fast.errors import ArgumentError, TgtError

WORDS = (
    "sort", "list", "tree", "node", "heap", "queue", "file", "path", "read", "write", "open", "close", "sum", "mean",
    "matrix", "vector",
)  # fmt: skip
CLASSES = ("alpha", "beta", "gamma")
TINY = Settings(
    classes=3, labels=12, decay=0.7, test_per_class=5, vocabulary=60, labeler_hidden=8, labeler_steps=4,
    labeler_batch=8, width=8, heads=2, steps=6, batch=8, variants=2, refreshes=1, evaluations=2,
    generator=GeneratorSettings(max_length=12, width=8, layers=1, hidden=16, head_width=4, steps=2, batch=8),
)  # fmt: skip


def entry(label: str, module: int, number: int) -> Entry:
    words = random.Random(f"{label}{module}{number}").choices(WORDS[5 * CLASSES.index(label) :][:6], k=7)
    return Entry(label, f"{label}.m{module}", f"f{number}", label, " ".join(words), f"as {number} says")


def corpus_of(labels: tuple[str, ...] = CLASSES, modules: int = 9) -> Corpus:
    parts: dict[str, list[Entry]] = {"train": [], "validation": [], "test": []}
    for place, label in enumerate(labels):
        for module in range(modules):
            name = "test" if module in (0, 1) else "validation" if module == 2 else "train"
            parts[name] += [entry(label, module, number) for number in range(4 - place)]
    return Corpus(*(tuple(parts[name]) for name in ("train", "validation", "test")))


@pytest.fixture(scope="module")
def encoder() -> Iterator[sentences.SentenceEncoder]:
    """A sentence encoder of the real class of model and size of output, with random weights, in the place of the
    pretrained one."""
    import transformers

    pieces = [*vocabulary.SPECIAL, *"abcdefghijklmnopqrstuvwxyz0123456789", *WORDS, "as", "says"]
    pieces += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(pieces), hidden_size=384, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32,
    )  # fmt: skip
    made = sentences.SentenceEncoder(transformers.BertModel(config), vocabulary.word_pieces(pieces, 32)).eval()
    with pytest.MonkeyPatch.context() as patch:
        for module in (run, teachers):
            patch.setattr(module, "sentence_encoder", lambda: made)
        patch.setattr(run, "sentence_tokenizer", lambda: made.tokenizer)
        yield made


@pytest.fixture(scope="module")
def tiny(encoder: sentences.SentenceEncoder) -> DemoResult:
    return run.run_demo((1, 0), TINY, corpus=corpus_of(), workers=0)


def test_classes_are_public_subpackages_with_modules_in_every_part() -> None:
    assert data.choose_classes(corpus_of(), 3) == list(CLASSES)  # the largest first
    with pytest.raises(ArgumentError, match="have 3 subpackages"):
        data.choose_classes(corpus_of(), 4)
    few = corpus_of(modules=5)
    with pytest.raises(ArgumentError, match="have 0"):
        data.choose_classes(few, 1)
    hidden = [replace(e, label="a._private" if e.label == "alpha" else "a.utils") for e in corpus_of(CLASSES[:2]).train]
    with pytest.raises(ArgumentError, match="have 0"):
        data.choose_classes(Corpus(tuple(hidden), tuple(hidden), tuple(hidden)), 1)


def test_the_tail_is_long_and_a_seed_chooses_who_is_in_it() -> None:
    counts = data.class_counts(20, 500, 0.85)
    assert counts == sorted(counts, reverse=True)
    assert abs(sum(counts) - 500) <= 5
    assert min(counts) >= 3
    texts = data.Texts(tuple("abcdefgh"), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), torch.ones(8, 2, dtype=torch.int64))
    chosen = [data.long_tailed(texts, [3, 1], seed) for seed in (0, 0, 1, 2)]
    assert all(texts.y[rows].tolist() == [0, 0, 0, 1] for rows in chosen)
    assert torch.equal(chosen[0], chosen[1])
    assert len({tuple(rows.tolist()) for rows in chosen}) > 1
    assert data.at_most(texts, 2).text == ("a", "b", "e", "f")


def test_tokens_end_with_sep_and_fit() -> None:
    tokenizer = vocabulary.word_pieces([*vocabulary.SPECIAL, "sort", "list"], 4)
    rows = data.token_rows(["Sort list", "sort sort list list list", "unknown"], tokenizer)
    assert rows.tolist() == [[5, 6, SEP, PAD], [5, 5, 6, SEP], [1, SEP, PAD, PAD]]


def test_the_commonest_pieces_are_kept(encoder: sentences.SentenceEncoder) -> None:
    kept = vocabulary.common_pieces(["sort tree tree", "tree sort sum"], encoder.tokenizer, 7)
    assert kept == [*vocabulary.SPECIAL, "tree", "sort"]


def student() -> models.Student:
    torch.manual_seed(0)
    return models.Student(20, 3, 8, 2, 2, 0.0, 6).eval()


def test_the_student_sees_no_padding_and_takes_embeddings() -> None:
    net = student()
    ids = torch.tensor([[5, 6, 7, SEP, PAD, PAD], [8, SEP, PAD, PAD, PAD, PAD]])
    together = net(models.as_input(ids))
    alone = torch.cat([net(models.as_input(row[None])) for row in ids])
    torch.testing.assert_close(together, alone)
    assert (together[0] - together[1]).abs().max() > 1e-3
    given = models.as_input(ids)
    embedded = {"inputs_embeds": net.embedding(given["input_ids"]), "attention_mask": given["attention_mask"]}
    torch.testing.assert_close(net(embedded), together)
    order = ids.clone()
    order[0, :2] = ids[0, :2].flip(0)
    assert (net(models.as_input(order))[0] - together[0]).abs().max() > 1e-5  # it reads words in order


def test_masks_and_noise_are_of_the_settings_size() -> None:
    draw = torch.Generator().manual_seed(0)
    ids = torch.full((200, 30), 7)
    ids[:, 20:] = PAD
    s = GeneratorSettings(masked=0.4, noise=3.0)
    hidden = generator.masked(ids, s, draw) == MASK
    assert not hidden[:, 20:].any()
    assert hidden[:, :20].float().mean().item() == pytest.approx(0.2, abs=0.03)
    z = 5 * torch.randn(200, 30, 4, generator=draw)
    size = (generator.noised(z, ids != PAD, s, draw) - z).std((1, 2)) / 5
    assert size.max().item() == pytest.approx(3.0, abs=0.5)
    assert size.mean().item() == pytest.approx(1.5, abs=0.2)


def test_anchors_may_be_even_over_classes() -> None:
    y = torch.tensor([0] * 90 + [1] * 10)
    assert torch.equal(pool.chosen_anchors(y, "batch", 3), torch.arange(100))
    even = torch.cat([pool.chosen_anchors(y, "balanced", step) for step in range(20)])
    assert y[even].float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert torch.equal(pool.chosen_anchors(y, "balanced", 3), even[300:400])


def test_a_run_has_every_method_and_seed(tiny: DemoResult) -> None:
    assert [(s.method, s.seed) for s in tiny.students] == [(method, seed) for method in METHODS for seed in (1, 0)]
    labels = sum(tiny.texts.counts)
    for made in tiny.students:
        assert 0 <= made.accuracy <= 100
        assert made.labels == labels
        assert [step for step, _ in made.curve] == [3, 6]
        assert made.curve[-1][1] == pytest.approx(made.accuracy)
        synthetic = {"tgt-random": 2 * labels, "tgt-gradient": 3 * labels}.get(made.method, 0)
        assert made.synthetic == synthetic
        assert bool(made.examples) == bool(synthetic)
        assert (made.ascent is not None) == (made.method == "tgt-gradient")
    assert tiny.pool.texts == 2 * labels
    assert sum(tiny.pool.mass) == pytest.approx(2 * labels, rel=1e-4)


def test_the_numbers_depend_neither_on_the_seeds_beside_nor_on_what_ran_before(
    tiny: DemoResult, tmp_path: Path
) -> None:
    torch.manual_seed(12345)
    kept = Artifacts(tmp_path)
    for _ in range(2):  # making the teacher, then finding it
        again = run.run_demo((0,), TINY, corpus=corpus_of(), artifacts=kept, workers=0)
        assert numbers(again) == [row for row in numbers(tiny) if row[1] == 0]
    assert {file.name.partition("-")[0] for file in tmp_path.iterdir()} == {"generator", "embeddings"}


def numbers(result: DemoResult) -> list[tuple[object, ...]]:
    """Everything but the times."""
    return [
        (s.method, s.seed, s.accuracy, s.mean_kl, s.per_class, s.curve, s.ascent, s.examples) for s in result.students
    ]


def test_json_has_the_promised_form(tiny: DemoResult) -> None:
    content = json.loads(json.dumps(results.as_json(replace(tiny))))
    assert list(content["methods"]) == ["one-hot", "distillation", "tgt-random", "tgt-gradient"]
    for method, found in content["methods"].items():
        assert set(found["accuracy"]) == {"mean", "std", "per_seed"}
        assert found["accuracy"]["per_seed"] == tiny.numbers(method, "accuracy")
    assert content["seeds"] == [1, 0]


def test_the_page_shows_every_plot_and_example(tiny: DemoResult, tmp_path: Path) -> None:
    html = page.write_page(tiny, tmp_path).read_text(encoding="utf-8")
    names = ["accuracy", "classes", "coverage", "learning"]
    assert sorted(p.stem for p in tmp_path.glob("*.png")) == names
    for label in findings.LABELS.values():
        assert label in html
    for example in tiny.of("tgt-gradient")[0].examples:
        assert example.made in html


def test_findings_say_what_helped_and_what_did_not(tiny: DemoResult) -> None:
    reached = {"one-hot": 40.0, "distillation": 42.0, "tgt-random": 45.0, "tgt-gradient": 44.0}
    students = tuple(replace(s, accuracy=reached[s.method] + s.seed) for s in tiny.students)
    said = findings.findings(replace(tiny, students=students))
    assert "gained 3.0 points, in each of 2 seeds" in said[0]
    assert "gained 5.0 points" in said[1]
    assert "lost 1.0 points, in each of 2 seeds: it did not help" in said[3]


@pytest.mark.parametrize("seeds", [(), (1, 1), (-1,)])
def test_seeds_that_make_no_run_are_refused(seeds: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError, match="seeds"):
        run.run_demo(seeds, TINY, workers=0)


def test_teacher_guided_training_needs_texts_to_begin_with() -> None:
    texts = data.Texts(("a",), torch.tensor([0]), torch.ones(1, 2, dtype=torch.int64))
    labelled = Labelled(texts, torch.zeros(1, 3))
    teacher = teachers.TeacherWeights(["a"] * 5, {}, {}, 3)
    with pytest.raises(ArgumentError, match="tgt-random begins"):
        train_student("tgt-random", labelled, labelled, [1, 1, 1], TINY, 0, teacher)


def test_tuning_ranks_choices_on_the_validation_texts(encoder: sentences.SentenceEncoder) -> None:
    found = tune.tune(["noise", "one-hot"], [5, 6], workers=0, base=TINY, corpus=corpus_of())
    assert [len(row["per_seed"]) for row in found["noise"]] == [2, 2]
    ranked = [row["accuracy"] for row in found["one-hot"]]
    assert ranked == sorted(ranked, reverse=True)


def test_every_group_of_tuning_contains_the_chosen_settings_and_methods_choose_among_as_many() -> None:
    base = Settings()
    for group in tune.GROUPS:
        assert any(trial.settings == base for trial in tune.trials(group, base)), group
    assert len({len(tune.trials(method, base)) for method in METHODS}) == 1


def test_quick_settings_cap_the_texts() -> None:
    short = settings.quick(Settings())
    assert short.limit == 3000
    assert (short.classes, short.students) == (Settings().classes, Settings().students)


def test_a_missing_package_is_named_before_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run, "run_demo", lambda *a, **k: pytest.fail("the demo began to run"))
    demo = replace(DEMOS["docstrings"], packages={"no_such_module": "some-package"})
    with pytest.raises(TgtError, match=r"some-package: pip install 'tgt-fast\[text\]'"):
        command.run_command(demo, None, True, tmp_path / "r", None, None)  # type: ignore[arg-type]


def test_the_command_line_reaches_the_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[object] = []

    def take(demo: Demo, *arguments: object, cache: bool, **options: object) -> None:
        given.extend((demo.name, *arguments[:4], cache))

    monkeypatch.setattr(command, "run_command", take)
    out = str(tmp_path)
    line = ["demo", "docstrings", "--quick", "--seeds", "3,4", "--out", out, "--json", f"{out}/n.json", "--no-cache"]
    assert cli.main(line) == 0
    assert given == ["docstrings", [3, 4], True, tmp_path, tmp_path / "n.json", False]
    given.clear()
    assert cli.main(["demo", "docstrings"]) == 0
    assert given == ["docstrings", None, False, Path("report"), None, True]
