"""The recipe's data sections: where rows come from, how they are cleaned and checked, and how more are generated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from tunesmith.recipe.rules import QUALITY, SCREENING, Rule, Setting, unknown_rules
from tunesmith.recipe.sections import Auto, PositiveInt, Section

#: Chat templates that need no file.
NAMED_TEMPLATES = ("chatml", "llama2", "llama3", "qwen", "chatglm", "mistral", "gemma", "phi")


def _unquoted_off(value: Any) -> Any:
    """The value, with `off` restored: YAML 1.1 reads unquoted `off` as false."""
    return "off" if value is False else value


RuleSetting = Annotated[Setting, BeforeValidator(_unquoted_off)]


def _checked_rules(given: dict[str, Setting], known: Mapping[str, Rule]) -> dict[str, Setting]:
    if wrong := list(unknown_rules(given, known)):
        raise ValueError("; ".join(wrong))
    return given


class CleanSection(Section):
    """How a row's text is cleaned. Code, JSON, maths, emoji and joiners that a script needs stay unchanged."""

    html: bool = True
    """Convert text that is all HTML markup to plain text; `pre` and `code` become Markdown code, rows about HTML stay."""
    mojibake: bool = True
    """Repair text decoded with the wrong character set, such as `Ã©` for `é`."""
    unicode: bool = True
    """Compose decomposed characters (NFC); no character is replaced by one that looks different."""
    control: bool = True
    """Remove control characters and terminal colours; form feeds become newlines."""
    zero_width: bool = True
    """Remove invisible characters that the surrounding script does not need."""
    whitespace: bool = True
    """Use one kind of line ending, no trailing blanks, at most two blank lines in a row; indentation stays."""


class DuplicatesSection(Section):
    """Near-duplicate rows, found by MinHash over words."""

    threshold: Annotated[float, Field(gt=0, le=1)] | None = 0.8
    """Rows whose sets of word trigrams overlap by this much (Jaccard) are duplicates; null finds only equal rows."""
    num_perm: Annotated[int, Field(ge=16, le=1024)] = 64
    """Hash functions per signature: more of them find more pairs near the threshold and take more time."""


class BalanceSection(Section):
    """Down-sampling of overrepresented classes."""

    label: str | None = None
    """A column, or a Jinja expression over `row`, `messages`, `answer` and `answer_json`, such as `answer_json.intent`."""
    cap: PositiveInt | None = None
    """Maximum rows per class."""
    ratio: Annotated[float, Field(ge=1)] | None = None
    """Maximum rows per class, as a multiple of the smallest class."""


class OverlapSection(Section):
    """Benchmarks that the rows must not contain: shared runs of 13 words are reported."""

    mmlu: str | None = None
    """MMLU's folder with test/<subject>_test.csv."""
    gsm8k: str | None = None
    """GSM8K's test.jsonl."""
    humaneval: str | None = None
    """HumanEval.jsonl or .jsonl.gz."""


RowFormat = Literal["auto", "messages", "alpaca", "sharegpt", "prompt"]


def is_template(column: str) -> bool:
    """Whether a value of `columns` is a Jinja template and not a column name."""
    return "{{" in column or "{%" in column


def _checked_columns(given: dict[str, str]) -> dict[str, str]:
    """The mapping, once its templates are known to parse."""
    from jinja2 import TemplateError  # not needed by a recipe without templates

    from tunesmith.io.templates import BoundedEnvironment

    for ours, theirs in given.items():
        if is_template(theirs):
            try:
                BoundedEnvironment().parse(theirs)
            except TemplateError as error:
                raise ValueError(f"the template of {ours!r} cannot be parsed: {error}") from error
    return given


class PartSection(Section):
    """Rows from one place."""

    path: str
    """A file, a folder or `hub:owner/name`, as in `data.train`."""
    format: RowFormat | None = None
    """Row format of this part; defaults to data.format."""
    columns: Annotated[dict[str, str], AfterValidator(_checked_columns)] | None = None
    """Column mapping of this part; defaults to data.columns."""
    split: str | None = None
    """The split of a folder, a hub data set or a .json file with splits; defaults to `train`."""


Part = TypeVar("Part", bound=PartSection)


class SourceSection(PartSection):
    """One of several row sources."""

    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of the mixture, relative to the other sources' weights; give a weight to all sources or to none."""


class DataSection(Section):
    """The data to train on and the data held out."""

    train: str
    """Rows to train on, relative to the recipe: .jsonl, .json, .csv or .conll (also .gz, .zst), .parquet, .arrow, .feather, a
    folder of such files, or `hub:owner/name@revision`. With `objective: pretrain`: rows with a `text`, a .txt or .md file, or a
    folder of those, where each file is a document. Omit it if `sources` is given."""
    sources: list[SourceSection] = Field(default_factory=list)
    """Several sources instead of `train`, mixed by weights or by `temperature`; without either, all rows of all sources."""
    temperature: Annotated[float, Field(ge=1)] | None = None
    """Mix sources in proportion to rows ^ (1 / temperature): 1 mixes by size, more favours small sources."""
    columns: Annotated[dict[str, str], AfterValidator(_checked_columns)] = Field(default_factory=dict)
    """Maps the format's names to the file's columns, such as `{prompt: question, completion: answer}`. A value may be a Jinja
    template over the row, such as `"{{ entities | tojson }}"`."""
    test: str | PartSection | None = None
    """Test rows of the task: a path, or a section as in `sources` but without `weight`. Never trained on. Without it,
    `evaluate` uses the held-out rows."""
    format: RowFormat = "auto"
    """Row format; `auto` infers it from each row's columns. With an objective on pairs, the format of their prompts."""
    system: str | None = None
    """A system turn prepended to conversations that have none."""
    heldout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the train rows held out for the eval loss (a seeded draw)."""
    max_rows: PositiveInt | None = None
    """Train on at most this many rows (a seeded draw; the rest count as unused, reason `over-max-rows`)."""
    max_length: Annotated[int, Field(ge=8)] = 2048
    """Maximum row length in tokens (for a pair, of the longer side); `overlong` handles longer rows. With
    `objective: pretrain`, longer documents continue in further rows, and nothing is lost."""
    overlong: Literal["reject", "truncate", "split"] = "reject"
    """What happens to longer rows: rejected, later turns dropped, or split between turns into several rows. The last two only
    with `objective: sft`: pairs, judged answers and prompts cannot be cut."""
    truncate_answers: bool = False
    """With `overlong: truncate`, cut inside the answer if a row's first answer is already too long."""
    workers: PositiveInt | Auto = "auto"
    """Processes that read rows; the result does not depend on it. `auto` is one, or all cores from 20,000 rows on."""
    on_bad_row: Literal["error", "reject"] = "error"
    """How to treat an unusable row: stop `prepare` and name every such row, or reject and count it."""
    chat_template: str | None = None
    """Replaces the tokenizer's own template: chatml, llama2, llama3, qwen, chatglm, mistral, gemma, phi, or a Jinja file."""
    clean: CleanSection = CleanSection()
    """How texts are cleaned."""
    quality: dict[str, RuleSetting] = Field(default_factory=dict)
    """Quality rules with an action other than the default: warn, fix, reject or off (docs/data.md lists the rules)."""
    screening: dict[str, RuleSetting] = Field(default_factory=dict)
    """The same for screening rules: secrets, personal data, injections, hidden text."""
    duplicates: DuplicatesSection = DuplicatesSection()
    """Near-duplicates."""
    balance: BalanceSection = BalanceSection()
    """Overrepresented classes."""
    overlap: OverlapSection = OverlapSection()
    """Benchmarks to search for in the rows."""
    review: str = "review.jsonl"
    """Where `tunesmith review` saves decisions about rows; the next `prepare` drops and edits rows accordingly."""
    require_review: bool = False
    """Train only on data that someone has signed off with `tunesmith review`."""

    @model_validator(mode="before")
    @classmethod
    def _one_way_in(cls, given: Any) -> Any:
        """Allow `train` to be missing if there are sources."""
        if isinstance(given, dict) and given.get("sources"):
            if given.get("train"):
                raise ValueError("give data.train or data.sources, not both")
            return {**given, "train": ""}
        return given

    @model_validator(mode="after")
    def _checked_weights(self) -> DataSection:
        weights = [source.weight for source in self.sources]
        if len({weight is None for weight in weights}) > 1:
            raise ValueError("give a weight to all data.sources, or to none")
        if self.temperature is not None and (not weights or weights[0] is not None):
            raise ValueError("data.temperature requires data.sources without weights")
        if self.truncate_answers and self.overlong != "truncate":
            raise ValueError("data.truncate_answers requires data.overlong: truncate")
        return self

    @property
    def parts(self) -> list[SourceSection]:
        """The sources, or the one that `train` names, with defaults inherited from the section."""
        return [self._filled(source) for source in self.sources or [SourceSection(path=self.train)]]

    @property
    def test_part(self) -> PartSection | None:
        """The test set, with defaults inherited from the section."""
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
    """More rows through paraphrases from an OpenAI-compatible endpoint, for `tunesmith augment`."""

    base_url: str | None = None
    """The endpoint, such as http://localhost:8000/v1."""
    model: str | None = None
    """The model's name at the endpoint."""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; local servers need none."""
    out: str = "augmented.jsonl"
    """Output file for the new rows; answers are cached next to it, so that no request is sent twice."""
    paraphrases: PositiveInt = 1
    """Paraphrases requested per row."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    """Sampling temperature of the paraphrases."""
    concurrency: Annotated[int, Field(gt=0, le=256)] = 8
    """Concurrent requests."""
    max_retries: Annotated[int, Field(ge=0)] = 5
    """How often a failed request is retried, with growing delays."""
    max_requests: PositiveInt = 1000
    """Maximum answers to pay for, including those of earlier runs into the same file; failed attempts do not count."""
    max_tokens: PositiveInt = 1_000_000
    """Maximum prompt and answer tokens, including those of earlier runs; requests in flight at the limit still count."""
