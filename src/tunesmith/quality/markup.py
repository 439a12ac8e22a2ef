"""HTML to text, for text that was copied as markup: paragraphs, lists and code become plain text and Markdown code.

Only text that is very unlikely to be meant as markup is converted: it begins and ends with a tag, has a block tag, and has no
tags other than those of running text. A whole page (`html`, `head`, `script`, `style`, forms), XML and made-up tags such as
`<think>` are not changed, nor is any row that talks about HTML.
"""

from __future__ import annotations

import re
from typing import Any

_TAG = re.compile(r"</?([A-Za-z][\w:-]*)\b[^<>]*>")
_ABOUT = re.compile(r"\b(?:x?html5?|xml|css|markup|tags?|web ?pages?|javascript|jsx|dom)\b", re.IGNORECASE)
_BLOCK = frozenset(
    {"p", "div", "br", "li", "ul", "ol", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "table", "tr", "blockquote", "hr"}
)
_INLINE = frozenset(
    {
        "a",
        "b",
        "i",
        "u",
        "em",
        "strong",
        "code",
        "span",
        "sub",
        "sup",
        "small",
        "s",
        "del",
        "ins",
        "kbd",
        "mark",
        "q",
        "abbr",
        "cite",
        "img",
        "td",
        "th",
        "thead",
        "tbody",
    }
)
_NEW_LINE = frozenset({"div", "li", "tr", "br"})
_NEW_PARAGRAPH = frozenset({"p", "ul", "ol", "h1", "h2", "h3", "h4", "h5", "h6", "table", "blockquote", "hr"})


def is_about_html(text: str) -> bool:
    """Whether the words of a text, without its tags, talk about HTML or web code."""
    return _ABOUT.search(_TAG.sub(" ", text)) is not None


def html_to_text(text: str) -> str | None:
    """The plain text of markup; None if the text is not markup, or may be meant as markup."""
    trimmed = text.strip()
    if not (trimmed.startswith("<") and trimmed.endswith(">")) or "```" in text:
        return None
    names = {match.group(1).lower() for match in _TAG.finditer(trimmed)}
    if not names & _BLOCK or names - _BLOCK - _INLINE or not _TAG.match(trimmed):
        return None
    from selectolax.lexbor import LexborHTMLParser

    body = LexborHTMLParser(trimmed).body
    if body is None:
        return None
    parts: list[str] = []
    _walk(body, parts)
    lines = "".join(parts)
    return re.sub(r"[ \t]*\n(?:[ \t]*\n)+", "\n\n", lines).strip("\n ")


def _walk(node: Any, parts: list[str]) -> None:
    """Append the text of a node's children."""
    for child in node.iter(include_text=True):
        name = child.tag
        if name == "-text":
            parts.append(re.sub(r"\s+", " ", child.text(deep=False)))
        elif name == "pre":
            parts.append(_fenced(child))
        elif name == "code":
            parts.append(_inline(child.text()))
        else:
            _element(child, name, parts)


def _element(node: Any, name: str, parts: list[str]) -> None:
    edge = "\n\n" if name in _NEW_PARAGRAPH else "\n" if name in _NEW_LINE else ""
    parts.append(edge + ("- " if name == "li" else ""))
    _walk(node, parts)
    if name in ("td", "th"):
        parts.append("\t")
    elif name == "img":
        parts.append(node.attributes.get("alt") or "")
    elif name in _NEW_PARAGRAPH:
        parts.append(edge)


def _fenced(node: Any) -> str:
    code = node.text().strip("\n")
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", code)), default=0))
    return f"\n\n{fence}\n{code}\n{fence}\n\n"


def _inline(code: str) -> str:
    return f"`{code}`" if "`" not in code else f"`` {code} ``"
