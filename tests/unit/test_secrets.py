"""Likely secrets: found by kind in a sentence, never repeated, and never in ordinary text."""

import random
import string
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_tune.data.secrets import find_secrets


def _some(count: int, *, alphabet: str = string.ascii_letters + string.digits, seed: int = 3) -> str:
    """Keys are made here: one written out would alarm every scanner that reads this file."""
    return "".join(random.Random(seed).choices(alphabet, k=count))


CAPITALS = string.ascii_uppercase + "234567"
DASHED = string.ascii_letters + string.digits + "-_"
SECRETS = [
    ("private key", "-----BEGIN " + "PRIVATE KEY-----\nMIIE"),
    ("private key", "-----BEGIN " + "RSA PRIVATE KEY-----\nMIIE"),
    ("private key", "-----BEGIN " + "OPENSSH PRIVATE KEY-----\nb3Bl"),
    ("private key", "-----BEGIN " + "PGP PRIVATE KEY BLOCK-----\nlQO"),
    ("api key (AKIA…, AWS)", "AKIA" + _some(16, alphabet=CAPITALS)),
    ("api key (AKIA…, AWS)", "ASIA" + _some(16, alphabet=CAPITALS)),
    ("api key (ghp_…, GitHub)", "ghp_" + _some(36)),
    ("api key (ghp_…, GitHub)", "gho_" + _some(36)),
    ("api key (github_pat_…)", "github_pat_" + _some(22) + "_" + _some(59)),
    ("api key (glpat-…, GitLab)", "glpat-" + _some(20)),
    ("api key (xox…, Slack)", "xoxb-" + _some(12, alphabet=string.digits) + "-" + _some(24)),
    ("api key (sk-…)", "sk-" + _some(48)),
    ("api key (sk-…)", "sk-proj-" + _some(60, alphabet=DASHED)),
    ("api key (sk-…)", "sk-ant-api03-" + _some(90, alphabet=DASHED)),
    ("api key (hf_…)", "hf_" + _some(34, alphabet=string.ascii_letters)),
    ("api key (AIza…, Google)", "AIza" + _some(35, alphabet=DASHED[:-2])),
    ("api key (sk_…, Stripe)", "sk_live_" + _some(24)),
    ("api key (sk_…, Stripe)", "rk_test_" + _some(24)),
    ("token (JWT)", f"eyJ{_some(30)}.eyJ{_some(60)}.{_some(43)}"),
    ("e-mail address", "jane.doe+news@mail.company.co.uk"),
    ("e-mail address", "J_Doe%x@company.de"),
    ("phone number", "+49 30 901820"),
    ("phone number", "+1 (212) 736-5000"),
    ("phone number", "+442079460958"),
    ("phone number", "+7 495 123-45-67"),
    # The test numbers that the card networks publish.
    ("credit card number", "4242 4242 4242 4242"),
    ("credit card number", "4111111111111111"),
    ("credit card number", "5555-5555-5555-4444"),
    ("credit card number", "3782 822463 10005"),
    ("credit card number", "3056 930902 5904"),
    ("credit card number", "6011111111111117"),
    # The examples of the IBAN registry.
    ("bank account number (IBAN)", "DE89 3704 0044 0532 0130 00"),
    ("bank account number (IBAN)", "GB29NWBK60161331926819"),
    ("bank account number (IBAN)", "FR14 2004 1010 0505 0001 3M02 606"),
    ("bank account number (IBAN)", "NO93 8601 1117 947"),
    ("bank account number (IBAN)", "MT84 MALT 0110 0001 2345 MTLC AST0 01S"),
    ("social security number (US)", "219-09-9999"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "secret"), SECRETS, ids=[f"{n} {kind}" for n, (kind, _) in enumerate(SECRETS)])
@pytest.mark.parametrize(
    "around", ["{}", "My Own One is {} AND that is all.", 'x = "{}"', "über ({}), 東京\n", "{} ist NEU"]
)
def test_a_secret_is_found_wherever_it_stands_and_only_that_kind_is_named(kind, secret, around):
    assert find_secrets(around.format(secret)) == [kind]


@pytest.mark.parametrize("text", [
    "", "Turn on the lights in the kitchen.", "日本語のテキスト", "\ud800 half a pair",
    "Write to user@example.com, ops@mail.example.org or me@host.test.", "git clone git@github.com:org/repo.git",
    "npm install react@18.2.0 and icon@2x.png", "@decorator\ndef f(): pass", "a @ b.com", "user@localhost",
    "AKIAIOSFODNN7EXAMPLE is the one of the manual",
    "a task-oriented-and-very-long-compound-word-with-3-digits-4-5", "sk-estimator-doc-link-and-some-more-class-names",
    "risk-adjusted-return-on-capital-2019-2020-2021",
    "def get_hf_model_name(): return ghp_path, k_live_stream", "hf_hub_download(repo_id, filename, revision=main)",
    "-----BEGIN PUBLIC KEY-----", "-----BEGIN CERTIFICATE-----", "the PRIVATE KEY",
    "eyJ is how every JWT begins", "eyJhbGciOi.not.a.token",
    "In 2024 we sold 1,234,567,890 units at 12.50.", "3.14159265358979323846", "2024-01-31T12:30:45+01:00",
    "call 0800 123 4567", "+1 212 555 0142", "x = a +12345", "+100 000 000 people", "2 +1 555",
    "4242 4242 4242 4243", "4242424242424242424242", "1234 5678 9012 3456", "0000 0000 0000 0000", "v4.4242424242424242",
    "DE89 3704 0044 0532 0130 01", "DE89 3704", "XX89 3704 0044 0532 0130 00", "AB12 CDEF 3456 7890 1234",
    "000-12-3456", "666-12-3456", "900-12-3456", "123-00-4567", "123-45-0000", "1123-45-6789", "219-09-99991",
    "550e8400-e29b-41d4-a716-446655440000", "sha256:" + "0123456789abcdef" * 4, "978-3-16-148410-0", "192.168.100.200",
    " ".join(str(n) for n in range(200)),
])  # fmt: skip
def test_ordinary_text_has_none(text):
    assert find_secrets(text) == []


def test_every_kind_is_named_once():
    text = "\n".join(secret for _, secret in SECRETS) * 2
    assert sorted(find_secrets(text)) == sorted({kind for kind, _ in SECRETS})


@given(st.text(), st.sampled_from(SECRETS), st.text())
def test_no_message_repeats_the_secret(before, secret, after):
    kinds = find_secrets(before + secret[1] + after)
    assert set(kinds) <= {kind for kind, _ in SECRETS}
    assert all(secret[1] not in kind for kind in kinds)


@given(st.integers(min_value=0, max_value=10**11 - 1), st.integers(min_value=0, max_value=9))
def test_a_card_number_has_the_right_last_digit(middle, last):
    """The last digit of a card number is fixed by the others (ISO/IEC 7812-1, Annex B), in its textbook wording."""
    payload = f"4929{middle:011d}"
    total = 0
    for place, digit in enumerate(payload):
        weighted = int(digit) * (2 if place % 2 == 0 else 1)
        total += weighted - 9 if weighted > 9 else weighted
    assert ("credit card number" in find_secrets(f"card {payload}{last}")) == (last == -total % 10)


@pytest.mark.parametrize("piece", [
    "1 ", "12 34-", "+49 ", "sk-", "-sk-", "eyJ.", "eyJaaaaaaaaaaaa.eyJ", "a@", "a.", "@a.", "xoxb-", "AKIA", "AB12 ", "-----BEGIN A",
    "PRIVATE KEY -----BEGIN ", "hf_", "_ghp_", "A", "4242 ",
])  # fmt: skip
def test_a_hostile_text_takes_no_longer_than_its_length_allows(piece):
    text = (piece + "PRIVATE KEY @ ") + piece * (200_000 // len(piece))
    begun = time.process_time()
    find_secrets(text)
    assert time.process_time() - begun < 2.0


def test_real_text_is_quick_and_has_few(shared_data):
    import json

    rows = json.loads((shared_data / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    texts = [row["output"] for row in rows]
    found = [kinds for text in texts if (kinds := find_secrets(text))]
    assert len(found) <= 5
    assert all(kind == "e-mail address" for kinds in found for kind in kinds)
