"""What is in RULER's prompts: the authors' wording, the right needles in the right places, the right distractors."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import texts_folder

from kvcomp.benchmarks.ruler import Sample, TaskError, generate
from kvcomp.benchmarks.ruler.texts import DEPTHS, NOISE, SENTENCE_END, common_words, sentences

NEEDLE = r"One of the special magic (numbers|uuids) for ([\w -]+) is: ([\w-]+)\."
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
ESSAYS = ["niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery"]
SINGULAR = ["niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"]
NEEDLES = {"niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4}


def tokenizer(text: str) -> SimpleNamespace:
    return SimpleNamespace(input_ids=re.findall(r"\w+|[^\w\s]", text))


def tokens(text: str) -> int:
    return len(tokenizer(text).input_ids)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return texts_folder.save(tmp_path_factory.mktemp("data"))


def written(task: str, data: Path, context: int = 1024, samples: int = 5) -> list[Sample]:
    return generate(task, tokenizer, context, samples=samples, seed=0, data=data)


def parts(prompt: str) -> tuple[str, str, str]:
    """The first line, the haystack, and the last line."""
    first, rest = prompt.split("\n", 1)
    haystack, last = rest.rsplit("\n", 1)
    return first, haystack, last


@pytest.mark.parametrize("task", SINGULAR)
def test_the_wording_for_one_value(task: str, data: Path) -> None:
    kind = "uuid" if task in ("niah_single_3", "niah_multikey_3") else "number"
    for sample in written(task, data):
        first, haystack, last = parts(sample.prompt)
        assert first == (
            f"A special magic {kind} is hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {kind} afterwards."
        )
        (value,) = sample.references
        ((_, key, _),) = (found for found in re.findall(NEEDLE, haystack) if found[2] == value)
        assert last == (
            f"What is the special magic {kind} for {key} mentioned in the provided text? "
            f"The special magic {kind} for {key} mentioned in the provided text is"
        )
        assert haystack.count(f"One of the special magic {kind}s for {key} is: {value}.") == 1
        assert haystack.count(f"for {key} is:") == 1
        assert re.fullmatch(UUID if kind == "uuid" else r"[1-9]\d{6}", value)
        if task == "niah_multikey_3":
            assert re.fullmatch(UUID, key)
        else:
            assert re.fullmatch(r"[\w ]+-[\w -]+", key)


@pytest.mark.parametrize("task", ["niah_multivalue", "niah_multiquery"])
def test_the_wording_for_several_values(task: str, data: Path) -> None:
    for sample in written(task, data):
        first, haystack, last = parts(sample.prompt)
        assert first == (
            "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
            "I will quiz you about the numbers afterwards."
        )
        key_of = {value: key for _, key, value in re.findall(NEEDLE, haystack)}
        asked = list(dict.fromkeys(key_of[value] for value in sample.references))
        query = asked[0] if task == "niah_multivalue" else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        assert len(asked) == (1 if task == "niah_multivalue" else 4)
        assert set(key_of) == set(sample.references)  # all values are asked for
        assert len(sample.references) == 4
        assert last == (
            f"What are all the special magic numbers for {query} mentioned in the provided text? "
            f"The special magic numbers for {query} mentioned in the provided text are"
        )


@pytest.mark.parametrize("task", ["niah_single_1", *ESSAYS])
def test_the_number_of_needles(task: str, data: Path) -> None:
    for sample in written(task, data):
        found = re.findall(NEEDLE, sample.prompt)
        assert len(found) == NEEDLES.get(task, 1)
        assert len({value for _, _, value in found}) == len(found)
        assert len({key for _, key, _ in found}) == (1 if task == "niah_multivalue" else len(found))


def test_needles_in_noise() -> None:
    (sample,) = generate("niah_single_1", tokenizer, 1024, samples=1, seed=0)
    lines = Counter(parts(sample.prompt)[1].split("\n"))
    assert NOISE == ("The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.")
    assert lines.pop(NOISE) > 20
    assert list(lines.values()) == [1]


@pytest.mark.parametrize("task", ["niah_multikey_2", "niah_multikey_3"])
def test_needles_among_needles(task: str, data: Path) -> None:
    for sample in written(task, data):
        lines = parts(sample.prompt)[1].split("\n")
        found = [re.fullmatch(NEEDLE, line) for line in lines]
        assert all(found)
        assert {match[1] for match in found if match} == {"uuids" if task.endswith("3") else "numbers"}
        assert len({match[3] for match in found if match}) == len(lines) > 10


@pytest.mark.parametrize("task", ESSAYS)
def test_needles_lie_between_sentences_at_forty_depths(task: str, data: Path) -> None:
    assert (len(DEPTHS), DEPTHS[0], DEPTHS[1], DEPTHS[-1]) == (40, 0.0, 0.03, 1.0)
    for sample in written(task, data, context=2048):
        text = parts(sample.prompt)[1]
        found = list(re.finditer(NEEDLE, text))
        assert len(found) == NEEDLES.get(task, 1)
        rest = split(text)
        assert rest == sentences(len(" ".join(rest).split()), data)  # the essays from their start
        assert {len(split(text[: needle.start()])) for needle in found} <= {int(len(rest) * depth) for depth in DEPTHS}


def split(text: str) -> list[str]:
    """The sentences of a text without its needles."""
    rest = re.sub(NEEDLE + " ?", "", text).strip()
    return SENTENCE_END.split(rest) if rest else []


@pytest.mark.parametrize("task", [*SINGULAR, "niah_multivalue", "niah_multiquery"])
def test_depth_is_where_the_first_needle_asked_for_is(task: str, data: Path) -> None:
    for sample in written(task, data):
        starts = [match.start() for match in re.finditer(NEEDLE, sample.prompt) if match[3] in sample.references]
        assert sample.depth == pytest.approx(min(starts) / len(sample.prompt), abs=1e-4)


def test_depths_are_spread_over_the_prompt() -> None:
    depths = [sample.depth for sample in generate("niah_single_1", tokenizer, 1024, samples=40, seed=0)]
    assert min(depths) < 0.2
    assert max(depths) > 0.8


def test_essays_start_again_where_they_end(data: Path) -> None:
    whole = len(" ".join(sentences(10**5, data)).split())
    assert whole == 10**5
    assert sentences(10**5, data)[:5] == sentences(1000, data)[:5]


QUESTION = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above. Answer: According to the "
    "chain(s) of variable assignment in the text above, 5 variables are assigned the value {value}, they are: "
)


def chain(text: str, letters: int) -> tuple[list[str], str]:
    """The variables of the chain in the text, in order, and its number; all else has to be noise."""
    head = re.search(rf"^VAR ([A-Z]{{{letters}}}) = (\d{{5}})$", text, re.MULTILINE)
    hops = re.findall(rf"^VAR ([A-Z]{{{letters}}}) = VAR ([A-Z]{{{letters}}}) $", text, re.MULTILINE)
    assert head
    names = [head[1], *(name for name, _ in hops)]
    assert [before for _, before in hops] == names[:-1]
    assert text.index(head[0]) < text.index(f"VAR {names[1]} = ")
    assert Counter(text.split("\n"))[NOISE] == len(text.split("\n")) - len(names)
    return names, head[2]


@pytest.mark.parametrize("context", [1024, 4096])
def test_variable_tracking(context: int, data: Path) -> None:
    samples = written("vt", data, context)
    for sample in samples:
        example, question = sample.prompt.split("\n\nMemorize")
        question = "Memorize" + question
        names, value = chain(question.split("\n\n")[1].split("\nQuestion: ")[0], letters=5)
        assert sample.references == tuple(names)
        assert len(set(names)) == 5
        assert question == QUESTION.format(context=question.split("\n\n")[1].split("\nQuestion: ")[0], value=value)
        place = sample.prompt.index(f"VAR {names[0]} = {value}")
        assert sample.depth == pytest.approx(place / len(sample.prompt), abs=1e-4)

        shown, answer = example.rsplit("they are: ", 1)
        text = shown.split("\n\n")[1].split("\nQuestion: ")[0]
        names, value = chain(text, letters=3)
        assert answer == " " + " ".join(names)
        assert shown + "they are: " == QUESTION.format(context=text, value=value)
        assert 0.9 * 500 <= tokens(shown + "they are: ") <= 500
    assert len({sample.references for sample in samples}) == len(samples)
    assert len({sample.prompt.split("\n\nMemorize")[0] for sample in samples}) == len(samples)


def test_variable_tracking_by_the_byte() -> None:
    """Where not even five repetitions fit the example's 500 tokens, five it is."""
    (sample,) = generate("vt", lambda text: SimpleNamespace(input_ids=text), 4096, samples=1, seed=0)
    assert sample.prompt.split("\n\nMemorize")[0].count(NOISE) == 5
    assert 0.9 * 4096 <= len(sample.prompt) + 30 <= 4096


LIST = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{list}\nQuestion: What are the 10 most common words in the above list? "
    "Answer: The top 10 words that appear most often in the list are:"
)


def items(text: str) -> list[str]:
    """The words of a numbered list."""
    numbers, words = zip(*re.findall(r"(\d+)\. (.+?)(?= \d+\. |$)", text), strict=True)
    assert list(map(int, numbers)) == list(range(1, len(words) + 1))
    return list(words)


@pytest.mark.parametrize(("context", "shown", "asked"), [(2048, (20, 3, 1), (6, 1)), (4096, (40, 10, 3), (30, 3))])
def test_common_words(context: int, shown: tuple[int, int, int], asked: tuple[int, int], data: Path) -> None:
    for sample in written("cwe", data, context, samples=2):
        lines = sample.prompt.split("\n")
        answer = lines[2].split("are: ", 1)[1]
        assert sample.prompt == f"{LIST.format(list=lines[1])} {answer}\n{LIST.format(list=lines[4])}"

        size, common, other = shown
        counts = Counter(items(lines[1]))
        assert Counter(counts.values()) == {common: 10, other: size - 10}
        assert sorted(items(answer)) == sorted(word for word, n in counts.items() if n == common)

        common, other = asked
        counts = Counter(items(lines[4]))
        assert set(counts.values()) == {common, other}
        assert sorted(sample.references) == sorted(word for word, n in counts.items() if n == common)
        assert len(sample.references) == 10
        assert set(counts) <= set(common_words(data))
        assert sample.depth is None


def test_common_words_stop_at_the_end_of_the_lists(tmp_path: Path) -> None:
    for name in ("nounlist", "adjectivelist", "verblist"):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name}{i}" for i in range(20)))
    (sample,) = generate("cwe", tokenizer, 4096, samples=1, seed=0, data=tmp_path)
    assert tokens(sample.prompt) < 2500
    texts_folder.write(tmp_path / "english_words.json", {str(i): f"word{i}" for i in range(3000)})
    (sample,) = generate("cwe", tokenizer, 4096, samples=1, seed=0, data=tmp_path)
    assert tokens(sample.prompt) > 0.9 * 4096 - 120
    assert all(reference.startswith("word") for reference in sample.references)


@pytest.mark.parametrize("context", [512, 1024, 8192])
def test_frequent_words(context: int, data: Path) -> None:
    for sample in written("fwe", data, context):
        start = (
            "Read the following coded text and track the frequency of each coded word. "
            "Find the three most frequently appeared coded words. "
        )
        end = (
            "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
            "frequently appeared words in the above coded text? Answer: According to the coded text above, the three "
            "most frequently appeared words are:"
        )
        assert sample.prompt.startswith(start)
        assert sample.prompt.endswith(end)
        counts = Counter(sample.prompt[len(start) : -len(end)].split(" "))
        (dots, most), *words = counts.most_common()
        assert dots == "..."
        assert all(re.fullmatch("[a-z]{6}", word) for word, _ in words)
        assert sample.references == tuple(word for word, _ in words[:3])
        assert words[2][1] > words[3][1]
        assert len(words) < (context - 50) // 50
        for k, (_, count) in enumerate(words, start=2):
            assert abs(count - most / k**2) <= 2  # zeta with exponent 2, rounded down


ONLY = "Answer the question based on the given documents. Only give me the answer and do not output any other words."


def documents(prompt: str) -> list[str]:
    """The documents of a prompt, whose wording and numbers are checked on the way."""
    start, end = f"{ONLY}\n\nThe following are given documents.\n\n", f"\n\n{ONLY}\n\nQuestion: "
    assert prompt.startswith(start)
    assert prompt.endswith(" Answer:")
    body, question = prompt[len(start) :].split(end)
    assert "\n" not in question
    found = re.split(r"(?:^|\n\n)Document \d+:\n", body)[1:]
    assert re.findall(r"^Document (\d+):$", body, re.MULTILINE) == [str(i) for i in range(1, len(found) + 1)]
    return found


def test_squad(data: Path) -> None:
    samples = written("qa_1", data, context=512, samples=8)
    for sample in samples:
        (name,) = re.findall(r"Question: What does (\d+-\d+) say\? Answer:$", sample.prompt)
        number, i = name.split("-")
        assert sample.references == (f"answer {number} {i}",)  # each answer once
        found = documents(sample.prompt)
        assert len(set(found)) == len(found)
        assert sum(document.startswith(f"Paragraph {name} of") for document in found) == 1
        # The other paragraphs of the article come before any others.
        assert sum(f"of article {number} says" in document for document in found) == texts_folder.PARAGRAPHS
        place = sample.prompt.index(f"Paragraph {name} of")
        assert sample.depth == pytest.approx(place / len(sample.prompt), abs=0.02)
    assert len({sample.references for sample in samples}) == 8
    assert len({sample.references[0].split()[1] for sample in samples}) > 3  # not all of the first articles
    assert len({round(sample.depth, 1) for sample in samples}) > 3


def test_squad_repeats_its_documents_when_all_are_in(data: Path) -> None:
    for sample in written("qa_1", data, context=4096, samples=2):
        counts = Counter(documents(sample.prompt))
        assert len(counts) == texts_folder.ARTICLES * texts_folder.PARAGRAPHS
        assert max(counts.values()) - min(counts.values()) == 1


def test_hotpotqa(data: Path) -> None:
    for sample in written("qa_2", data, context=1024):
        (number,) = re.findall(r"Question: Which word is hidden in (\d+)\? Answer:$", sample.prompt)
        assert sample.references == (f"secret{number}",)
        found = documents(sample.prompt)
        own = [document for document in found if document.startswith(f"Title {number}-")]
        assert len(own) == 10
        assert all(re.match(rf"Title {number}-(\d)\nThis is {number}-\1\. [A-Z]", document) for document in own)
        assert len(found) > 15


def test_a_small_context_keeps_the_paragraphs_that_hold_the_answer(data: Path) -> None:
    for sample in written("qa_2", data, context=256):
        (number,) = re.findall(r"hidden in (\d+)\?", sample.prompt)
        titles = [document.split("\n")[0] for document in documents(sample.prompt)]
        assert {f"Title {number}-3", f"Title {number}-7"} <= set(titles)
        assert all(title.startswith(f"Title {number}-") for title in titles)
        assert 2 <= len(titles) < 10


def test_questions_that_do_not_fit_are_passed_over(tmp_path: Path) -> None:
    texts_folder.save(tmp_path)
    rows = texts_folder.article(0, texts_folder.random.Random(0))
    for paragraph in rows["paragraphs"][:3]:
        paragraph["context"] += " word" * 2000
    texts_folder.write(tmp_path / "dev-v2.0.json", {"data": [rows]})
    samples = written("qa_1", tmp_path, samples=2)
    assert {sample.references for sample in samples} == {("answer 0 3",), ("answer 0 4",)}
    with pytest.raises(TaskError, match="samples: 3 are more than the 2 questions of qa_1"):
        written("qa_1", tmp_path, samples=3)


def test_schemas_of_the_other_files(tmp_path: Path) -> None:
    row = {"id": "1", "title": "T", "context": "It is blue.", "question": "What is it?", "answers": ["blue", "Blue"]}
    (tmp_path / "squad_dev1000").mkdir()
    file = texts_folder.write(tmp_path / "squad_dev1000" / "squad_dev1000.jsonl", row)
    for context in ("It is red.", "It is green."):
        more = texts_folder.json.dumps(row | {"context": context, "answers": ["red"]})
        file.write_text(f"{file.read_text()}\n{more}\n")
    samples = written("qa_1", tmp_path, samples=3)
    assert {sample.references for sample in samples} == {("blue", "Blue"), ("red",)}
    v1 = {"data": [{"paragraphs": [{"context": "X", "qas": [{"question": "Q?", "answers": [{"text": "x"}]}]}]}]}
    texts_folder.write(tmp_path / "xquad" / "squad.json", v1)  # preferred, and without is_impossible
    (sample,) = written("qa_1", tmp_path, samples=1)
    assert sample.references == ("x",)
