"""The recipe's sections of the data: where rows come from, what is mended in them, what they are worth, how more are made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from tunesmith.recipe.rules import QUALITY, SCREENING, Rule, Setting, unknown_rules
from tunesmith.recipe.sections import Auto, PositiveInt, Section

#: Chat templates that need no file.
NAMED_TEMPLATES = ("chatml", "llama2", "llama3", "qwen", "chatglm", "mistral", "gemma", "phi")


def _unquoted_off(value: Any) -> Any:
    """YAML 1.1 reads `off` without quotes as false."""
    return "off" if value is False else value


RuleSetting = Annotated[Setting, BeforeValidator(_unquoted_off)]


def _checked_rules(given: dict[str, Setting], known: Mapping[str, Rule]) -> dict[str, Setting]:
    if wrong := list(unknown_rules(given, known)):
        raise ValueError("; ".join(wrong))
    return given


class CleanSection(Section):
    """What is mended in a row's text. Code, JSON, maths, emoji and joiners that a script needs are left as they are."""

    html: bool = True
    """Turn text that is all HTML markup into plain text; `pre` and `code` become Markdown code, rows about HTML are left."""
    mojibake: bool = True
    """Repair text that was decoded with the wrong character set, such as `Ã©` for `é`."""
    unicode: bool = True
    """Compose characters that were written in parts (NFC); nothing that looks different is replaced."""
    control: bool = True
    """Remove control characters and terminal colours; form feeds become line ends."""
    zero_width: bool = True
    """Remove invisible characters where the script around them has no use for them."""
    whitespace: bool = True
    """One kind of line end, no blanks at line ends, at most two blank lines in a row; indentation stays."""


class DuplicatesSection(Section):
    """Rows that are nearly the same, by MinHash over words."""

    threshold: Annotated[float, Field(gt=0, le=1)] | None = 0.8
    """Rows whose sets of three-word runs overlap by this much (Jaccard) are duplicates; null looks for equal rows alone."""
    num_perm: Annotated[int, Field(ge=16, le=1024)] = 64
    """Hash functions of a signature: more find more pairs near the threshold and take more time."""


class BalanceSection(Section):
    """Down-sampling of classes that have too many rows."""

    label: str | None = None
    """A column, or a Jinja expression over `row`, `messages`, `answer` and `answer_json`, such as `answer_json.intent`."""
    cap: PositiveInt | None = None
    """Most rows of a class."""
    ratio: Annotated[float, Field(ge=1)] | None = None
    """Most rows of a class, as a multiple of the smallest class."""


class OverlapSection(Section):
    """Benchmarks that the rows must not contain: runs of 13 words that occur in them are reported."""

    mmlu: str | None = None
    """MMLU's folder with test/<subject>_test.csv."""
    gsm8k: str | None = None
    """GSM8K's test.jsonl."""
    humaneval: str | None = None
    """HumanEval.jsonl or .jsonl.gz."""


RowFormat = Literal["auto", "messages", "alpaca", "sharegpt", "prompt"]


def is_template(column: str) -> bool:
    """Whether a value of `columns` is a Jinja template, not the name of a column."""
    return "{{" in column or "{%" in column


def _checked_columns(given: dict[str, str]) -> dict[str, str]:
    """The mapping, whose templates can be parsed."""
    from jinja2 import TemplateError  # not needed by a recipe without templates

    from tunesmith.io.templates import BoundedEnvironment

    for ours, theirs in given.items():
        if is_template(theirs):
            try:
                BoundedEnvironment().parse(theirs)
            except TemplateError as error:
                raise ValueError(f"the template of {ours!r} cannot be read: {error}") from error
    return given


class PartSection(Section):
    """Rows of one place."""

    path: str
    """A file, a folder or `hub:owner/name`, as for `data.train`."""
    format: RowFormat | None = None
    """How its rows are written; data.format where it is not given."""
    columns: Annotated[dict[str, str], AfterValidator(_checked_columns)] | None = None
    """Its own mapping; data.columns where it is not given."""
    split: str | None = None
    """The split of a folder, a hub data set or a .json file that has splits; `train` where it is not given."""


Part = TypeVar("Part", bound=PartSection)


class SourceSection(PartSection):
    """One of several sources of rows."""

    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of the mixture, relative to the other sources' weights; give all sources one, or none."""


class DataSection(Section):
    """What is trained on, and what is kept aside."""

    train: str
    """Rows to train on, relative to the recipe: .jsonl, .json, .csv or .conll (also .gz, .zst), .parquet, .arrow, .feather, a
    folder of such files, or `hub:owner/name@revision`; with `objective: pretrain` rows with a `text`, or a .txt or .md file, or
    a folder of those, each of which is a document. Left out where `sources` is given."""
    sources: list[SourceSection] = Field(default_factory=list)
    """Several sources instead of `train`, mixed by their weights or by `temperature`, else all rows of all."""
    temperature: Annotated[float, Field(ge=1)] | None = None
    """Mix sources by their rows to the power of 1 / temperature: 1 is by size, more brings the small ones up."""
    columns: Annotated[dict[str, str], AfterValidator(_checked_columns)] = Field(default_factory=dict)
    """The file's columns by the format's names, such as `{prompt: question, completion: answer}`. A value may be a Jinja
    template over the row, such as `"{{ entities | tojson }}"`."""
    test: str | PartSection | None = None
    """Rows of the task's test set, a path or a section as in `sources` but without `weight`; never trained on. Without it
    `evaluate` uses the held-out rows."""
    format: RowFormat = "auto"
    """How rows are written; `auto` reads it off each row's columns. With an objective on pairs, how their prompts are."""
    system: str | None = None
    """A system turn put before conversations that have none."""
    heldout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the train rows kept aside for the eval loss (a seeded draw)."""
    max_rows: PositiveInt | None = None
    """Train on at most this many rows (a seeded draw; the rest count as unused, reason `over-max-rows`)."""
    max_length: Annotated[int, Field(ge=8)] = 2048
    """Longest row in tokens (of a pair the longer side); `overlong` says what becomes of longer ones. With
    `objective: pretrain` longer documents go on in further rows, and nothing is lost."""
    overlong: Literal["reject", "truncate", "split"] = "reject"
    """What happens to longer rows: left out, later turns dropped, or cut between turns into several. The last two with
    `objective: sft` alone: of pairs, judged answers and prompts nothing can be cut."""
    truncate_answers: bool = False
    """With `overlong: truncate`, cut inside the answer of a row whose first answer is too long already."""
    workers: PositiveInt | Auto = "auto"
    """Processes that read rows; the result is the same for any number. `auto` takes one, and all cores from 20,000 rows on."""
    on_bad_row: Literal["error", "reject"] = "error"
    """What a row that cannot be used does: stop `prepare` with every such row named, or be left out and counted."""
    chat_template: str | None = None
    """Instead of the tokenizer's own: chatml, llama2, llama3, qwen, chatglm, mistral, gemma, phi, or a Jinja file."""
    clean: CleanSection = CleanSection()
    """What is mended in texts."""
    quality: dict[str, RuleSetting] = Field(default_factory=dict)
    """Rules of quality whose action differs from the default: warn, fix, reject or off (docs/data.md names them)."""
    screening: dict[str, RuleSetting] = Field(default_factory=dict)
    """The same for rules of screening: secrets, personal data, injections, hidden text."""
    duplicates: DuplicatesSection = DuplicatesSection()
    """Near duplicates."""
    balance: BalanceSection = BalanceSection()
    """Classes with too many rows."""
    overlap: OverlapSection = OverlapSection()
    """Benchmarks to look for among the rows."""
    review: str = "review.jsonl"
    """Where `tunesmith review` keeps what it decided about rows; the next `prepare` leaves out and edits rows by it."""
    require_review: bool = False
    """Train only on data that somebody has signed off with `tunesmith review`."""

    @model_validator(mode="before")
    @classmethod
    def _one_way_in(cls, given: Any) -> Any:
        """`train` may be left out where there are sources."""
        if isinstance(given, dict) and given.get("sources"):
            if given.get("train"):
                raise ValueError("give data.train or data.sources, not both")
            return {**given, "train": ""}
        return given

    @model_validator(mode="after")
    def _checked_weights(self) -> DataSection:
        weights = [source.weight for source in self.sources]
        if len({weight is None for weight in weights}) > 1:
            raise ValueError("give all data.sources a weight, or none")
        if self.temperature is not None and (not weights or weights[0] is not None):
            raise ValueError("data.temperature wants data.sources without weights")
        if self.truncate_answers and self.overlong != "truncate":
            raise ValueError("data.truncate_answers wants data.overlong: truncate")
        return self

    @property
    def parts(self) -> list[SourceSection]:
        """The sources with what they take over from the section, or the one that `train` names."""
        return [self._filled(source) for source in self.sources or [SourceSection(path=self.train)]]

    @property
    def test_part(self) -> PartSection | None:
        """The test set, with what it takes over from the section."""
        if self.test is None:
            return None
        return self._filled(PartSection(path=self.test) if isinstance(self.test, str) else self.test)

    def _filled(self, part: Part) -> Part:
        columns = self.columns if part.columns is None else part.columns
        return part.model_copy(update={"format": part.format or self.format, "columns": columns})

    @field_validator("quality")
    @classmethod
    def _known_quality(cls, given: dict[str, Setting]) -> dict[str, Setting]:
        return _checked_rules(given, QUALITY)

    @field_validator("screening")
    @classmethod
    def _known_screening(cls, given: dict[str, Setting]) -> dict[str, Setting]:
        return _checked_rules(given, SCREENING)


class AugmentSection(Section):
    """More rows by paraphrases of an OpenAI-compatible endpoint, for `tunesmith augment`."""

    base_url: str | None = None
    """The endpoint, such as http://localhost:8000/v1."""
    model: str | None = None
    """The model's name there."""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; local servers need none."""
    out: str = "augmented.jsonl"
    """Where the new rows go; what was asked is kept beside it, so that nothing is asked twice."""
    paraphrases: PositiveInt = 1
    """Paraphrases asked for each row."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    """How free the paraphrases are."""
    concurrency: Annotated[int, Field(gt=0, le=256)] = 8
    """Requests at once."""
    max_retries: Annotated[int, Field(ge=0)] = 5
    """How often a request that failed is sent again, waiting longer each time."""
    max_requests: PositiveInt = 1000
    """Most answers to pay for, with those of earlier runs into the same file; an attempt that failed does not count."""
    max_tokens: PositiveInt = 1_000_000
    """Most tokens, prompts and answers, with those of earlier runs; requests on their way when it is reached still count."""
