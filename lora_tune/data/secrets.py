"""Likely secrets and personal data in a text: which kinds, never which text. A hint for its owner, no proof either way."""

import re
from collections.abc import Callable
from dataclasses import dataclass

_NO_WORD_BEFORE = r"(?<![A-Za-z0-9_])"


@dataclass(frozen=True)
class _Key:
    """A secret that looks like nothing else."""

    needle: str
    """Stands in every one of them, and is looked for first: that is ten times as fast as the pattern."""

    kind: str
    pattern: re.Pattern[str]


_COMMON = bytes(set(range(256)) - set(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789@_-"))


def _telling(text: str) -> str:
    """Return the capitals, digits, @, _ and - of the text: a tenth of it, and enough to see that it has no secret."""
    return text.encode(errors="replace").translate(None, _COMMON).decode()


def _key(needle: str, kind: str, pattern: str) -> tuple[str, _Key]:
    return _telling(needle) or "-", _Key(needle, kind, re.compile(_NO_WORD_BEFORE + pattern))  # a dash ends xox


_KEYS = (
    _key("PRIVATE KEY", "private key", r"-----BEGIN (?:[A-Z]{1,20} ){0,3}PRIVATE KEY(?: BLOCK)?-----"),
    _key("IA", "api key (AKIA…, AWS)", r"A[KS]IA[A-Z0-9]{16}(?![A-Za-z0-9])(?<!EXAMPLE)"),
    _key("AIza", "api key (AIza…, Google)", r"AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])"),
    _key("eyJ", "token (JWT)", r"eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"),
    _key("sk-", "api key (sk-…)", r"sk-(?=(?:[A-Za-z_-]{0,60}[0-9]){3})[A-Za-z0-9_-]{20,}"),
    _key("glpat-", "api key (glpat-…, GitLab)", r"glpat-[A-Za-z0-9_-]{20,}"),
    _key("xox", "api key (xox…, Slack)", r"xox[abeoprs]-[A-Za-z0-9-]{10,}"),
    _key("hf_", "api key (hf_…)", r"hf_[A-Za-z0-9]{30,}"),
    _key("_", "api key (ghp_…, GitHub)", r"gh[oprsu]_[A-Za-z0-9]{36,}"),
    _key("_pat_", "api key (github_pat_…)", r"github_pat_[A-Za-z0-9_]{40,}"),
    _key("k_", "api key (sk_…, Stripe)", r"[rs]k_(?:live|test)_[A-Za-z0-9]{16,}"),
)
"""What is telling in the needle, and the key."""

_EMAIL = re.compile(r"(?<![\w.%+-])([\w.%+-]{1,64})@((?:[A-Za-z0-9-]{1,63}\.){1,8}([A-Za-z]{2,24}))(?![\w-])")
_NO_DOMAIN = ("example.com", "example.org", "example.net")
_NO_TOP_DOMAIN = frozenset((
    "example", "test", "invalid", "local", "png", "jpg", "jpeg", "gif", "svg", "webp", "css", "js", "ts", "py",
))  # fmt: skip

_FEWEST_DIGITS = 8
_MANY_DIGITS = re.compile(r"[0-9](?:[ .()/-]{0,2}[0-9]){7}")
_PHONE = re.compile(
    # The calling codes of today; North American area codes do not begin with 0 or 1.
    r"(?<![\w+])\+(?:1(?=[ .(-]{0,2}[2-9])|7(?=[ .(-]{0,2}[3489])|2[07]|2[1-689][0-9]|3[0-469]|3[578][0-9]|4[013-9]"
    r"|42[0-9]|5[1-8]|5[09][0-9]|6[0-6]|6[7-9][0-9]|8[1246]|8[058][0-9]|9[0-58]|9[679][0-9])"
    r"(?:[ .()/-]{0,3}[0-9]){6,12}(?![0-9])"
)
_FICTIONAL = re.compile(r"555[ .-]?01[0-9]{2}$")
_CARD = re.compile(
    r"(?<![\w.+-])(?:(?:4[0-9]{3}|5[1-5][0-9]{2}|2[2-7][0-9]{2}|35[0-9]{2}|6(?:011|[245][0-9]{2}))([ -]?)[0-9]{4}\1[0-9]{4}\1[0-9]{4}"
    r"|3[47][0-9]{2}([ -]?)[0-9]{6}\2[0-9]{5}|3[068][0-9]{2}([ -]?)[0-9]{6}\3[0-9]{4})(?![\w-])"
)
_SSN = re.compile(r"(?<![\w.+-])(?!000|666|9)[0-9]{3}-(?!00)[0-9]{2}-(?!0000)[0-9]{4}(?![\w-])")
_IBAN = re.compile(r"(?<![A-Za-z0-9])([A-Z]{2})[0-9]{2}(?: ?[A-Z0-9]){11,30}")
_IBAN_CHARACTERS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "BY": 28,
    "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18,
    "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22,
    "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20,
    "LU": 20, "LV": 21, "LY": 25, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18,
    "NO": 15, "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SC": 31, "SE": 24,
    "SI": 19, "SK": 24, "SM": 27, "ST": 25, "SV": 28, "TL": 23, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24,
    "XK": 20,
}  # fmt: skip


def find_secrets(text: str) -> list[str]:
    """Return the kinds of likely secrets and personal data in the text, each once; empty for almost every text."""
    telling = _telling(text)
    kinds = [key.kind for hint, key in _KEYS if hint in telling and key.needle in text and key.pattern.search(text)]
    if "@" in telling and _any(_EMAIL, text, _is_email):
        kinds.append("e-mail address")
    enough = len(telling) >= _FEWEST_DIGITS and sum(map(str.isdigit, telling)) >= _FEWEST_DIGITS
    if enough and _MANY_DIGITS.search(text):
        kinds += [kind for kind, pattern, confirmed in _NUMBERS if _any(pattern, text, confirmed)]
    return kinds


def _any(pattern: re.Pattern[str], text: str, confirmed: Callable[[re.Match[str]], bool]) -> bool:
    return any(confirmed(match) for match in pattern.finditer(text))


def _is_email(match: re.Match[str]) -> bool:
    local, domain, top = match[1], match[2].lower(), match[3].lower()
    if top in _NO_TOP_DOMAIN or domain in _NO_DOMAIN or domain.endswith(tuple(f".{name}" for name in _NO_DOMAIN)):
        return False
    return not (local == "git" and match.string[match.end() : match.end() + 1] in (":", "/"))  # git@host:repository


def _is_phone(match: re.Match[str]) -> bool:
    return 8 <= len(_digits(match[0])) <= 15 and not _FICTIONAL.search(match[0])


def _is_card(match: re.Match[str]) -> bool:
    """The Luhn sum (ISO/IEC 7812-1) fits."""
    digits = [int(digit) for digit in reversed(_digits(match[0]))]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]
    return (sum(digits[0::2]) + sum(doubled)) % 10 == 0 and len(set(digits)) > 1


def _is_iban(match: re.Match[str]) -> bool:
    """The country's number of characters leaves the remainder 1 (ISO 13616)."""
    count = _IBAN_CHARACTERS.get(match[1], 0)
    packed = match[0].replace(" ", "")
    if not count or len(packed) < count:
        return False
    number = packed[4:count] + packed[:4]
    return int("".join(str(int(character, 36)) for character in number)) % 97 == 1


def _always(_: re.Match[str]) -> bool:
    return True


def _digits(text: str) -> str:
    return "".join(character for character in text if "0" <= character <= "9")


_NUMBERS: tuple[tuple[str, re.Pattern[str], Callable[[re.Match[str]], bool]], ...] = (
    ("phone number", _PHONE, _is_phone),
    ("credit card number", _CARD, _is_card),
    ("bank account number (IBAN)", _IBAN, _is_iban),
    ("social security number (US)", _SSN, _always),
)
