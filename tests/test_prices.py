"""Prices: dated tables, peak hours, exact arithmetic, tables of one's own."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from longreach.errors import RequestError
from longreach.server.call import Usage
from longreach.server.prices import (
    Price,
    builtin_tables,
    cost,
    cost_pico,
    exact_text,
    find_table,
    from_pico,
    parse_amount,
    parse_moment,
    to_pico,
)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text)


def per_million(table: str, model: str, when: str) -> tuple[str, str, str] | None:
    price = find_table(table).price_of(model, at(when))
    return None if price is None else (str(price.hit), str(price.miss), str(price.output))


PRO, FLASH = "deepseek-v4-pro", "deepseek-v4-flash"


@pytest.mark.parametrize(
    ("model", "when", "expected"),
    [
        (PRO, "2026-04-23T23:59:59.999Z", None),
        (PRO, "2026-04-24T00:00Z", ("0.145", "1.74", "3.48")),
        (FLASH, "2026-04-24T00:00Z", ("0.028", "0.14", "0.28")),
        (PRO, "2026-04-26T12:14:59Z", ("0.145", "1.74", "3.48")),
        (PRO, "2026-04-26T12:15Z", ("0.0145", "1.74", "3.48")),
        (FLASH, "2026-04-26T12:15Z", ("0.0028", "0.14", "0.28")),
        (PRO, "2026-04-27T00:00Z", ("0.003625", "0.435", "0.87")),
        (FLASH, "2026-05-20T03:00Z", ("0.0028", "0.14", "0.28")),
        (PRO, "2026-08-16T15:59:59Z", ("0.003625", "0.435", "0.87")),
        (PRO, "2026-08-16T16:00Z", ("0.022", "0.66", "1.98")),  # a Sunday
        (FLASH, "2026-08-16T16:00Z", ("0.003", "0.15", "0.60")),
    ],
)
def test_the_hosted_price_changes_at_the_published_minute(model, when, expected):
    assert per_million("hosted", model, when) == expected


PEAK, OFF_PEAK = ("0.044", "1.32", "3.96"), ("0.022", "0.66", "1.98")


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ("2026-11-24T00:59:59Z", OFF_PEAK),  # a Tuesday
        ("2026-11-24T01:00Z", PEAK),
        ("2026-11-24T03:59:59Z", PEAK),
        ("2026-11-24T04:00Z", OFF_PEAK),
        ("2026-11-24T05:59:59Z", OFF_PEAK),
        ("2026-11-24T06:00Z", PEAK),
        ("2026-11-24T09:59:59Z", PEAK),
        ("2026-11-24T10:00Z", OFF_PEAK),
        ("2026-11-24T09:30+08:00", PEAK),  # half past nine in Beijing
        ("2026-11-24T12:30+08:00", OFF_PEAK),
        ("2026-11-20T02:00Z", PEAK),  # Friday
        ("2026-11-21T02:00Z", OFF_PEAK),  # Saturday
        ("2026-11-22T07:00Z", OFF_PEAK),  # Sunday
        ("2026-11-23T07:00Z", PEAK),  # Monday
    ],
)
def test_peak_hours_are_two_spans_of_working_days_in_utc(when, expected):
    assert per_million("hosted", PRO, when) == expected


def test_prices_in_yuan_and_other_names_of_models():
    assert per_million("hosted-cny", PRO, "2026-11-24T02:00Z") == ("0.30", "9", "27")
    assert per_million("hosted-cny", "deepseek-flash", "2026-11-21T02:00Z") == ("0.02", "1", "4")
    assert per_million("hosted-cny", FLASH, "2026-05-20T00:00Z") is None
    assert per_million("hosted", "deepseek-reasoner", "2026-05-20T00:00Z") == ("0.0028", "0.14", "0.28")
    assert per_million("hosted", "small", "2026-05-20T00:00Z") is None
    assert find_table("hosted-cny").price_of(PRO, at("2026-11-24T02:00Z")).currency == "CNY"


def test_off_peak_is_half_of_peak_in_both_currencies():
    for table in ("hosted", "hosted-cny"):
        for model in find_table(table).models:
            peak = find_table(table).price_of(model, at("2026-11-24T02:00Z"))
            off = find_table(table).price_of(model, at("2026-11-21T02:00Z"))
            assert (peak.hit, peak.miss, peak.output) == (2 * off.hit, 2 * off.miss, 2 * off.output)


def test_a_period_named_alone_holds_at_all_times_with_its_peak_hours():
    assert per_million("launch", PRO, "2030-01-01T00:00Z") == ("0.145", "1.74", "3.48")
    assert per_million("current", PRO, "2026-05-20T02:00Z") == PEAK  # a Wednesday
    assert per_million("current", PRO, "2026-05-20T05:00Z") == OFF_PEAK


def test_a_table_knows_how_finely_its_prices_change(tmp_path):
    assert [find_table(name).step_minutes for name in ("hosted", "hosted-cny", "launch")] == [15, 60, 60]
    path = tmp_path / "own.json"
    path.write_text('{"periods": [{"from": "2026-03-01T00:07Z", GOOD}]}'.replace("GOOD", GOOD))
    assert find_table(str(path)).step_minutes == 1


def test_every_builtin_price_names_its_source():
    for table in builtin_tables().values():
        assert all(len(period.source) > 20 for period in table.periods)


def test_a_cost_is_what_a_hand_computes():
    price = find_table("hosted").price_of(PRO, at("2026-05-20T00:00Z"))
    # 900,000 hits at 0.003625, 100,000 misses at 0.435, 2,000 output tokens at 0.87, each per million
    assert cost(Usage(1_000_000, 900_000, 2_000, 1_500), price) == Decimal("0.0032625") + Decimal("0.0435") + Decimal(
        "0.00174"
    )
    assert cost(Usage(1, 1, 0), price) == Decimal("0.000000003625")
    assert cost_pico(Usage(1, 1, 0), price) == 3625
    assert cost(Usage(), price) == 0


def test_costs_are_exact_where_floats_are_not():
    price = Price(Decimal("0.1"), Decimal("0.2"), Decimal("0.3"))
    assert cost(Usage(3_000_000, 1_000_000, 1_000_000), price) == Decimal("0.8")
    r = random.Random(0)
    total_pico, total = 0, Decimal(0)
    for _ in range(1000):
        price = Price(*(Decimal(r.randrange(10**9)).scaleb(-6) for _ in range(3)))
        hit, miss, output = r.randrange(10**6), r.randrange(10**6), r.randrange(10**6)
        total_pico += cost_pico(Usage(hit + miss, hit, output), price)
        total += (hit * price.hit + miss * price.miss + output * price.output) / 1_000_000
    assert from_pico(total_pico) == total
    assert to_pico(total) == total_pico


@pytest.mark.parametrize(
    ("value", "text"), [("5", "5.00"), ("0.0036250", "0.003625"), ("-1.5", "-1.50"), ("0", "0.00")]
)
def test_amounts_are_written_exactly(value, text):
    assert exact_text(Decimal(value)) == text


@pytest.mark.parametrize("text", ["", "five", "-1", "nan", "inf", "1e9", "1000000.01", "1,5", "0x10"])
def test_what_is_no_amount_of_money_is_refused(text):
    with pytest.raises(RequestError, match="--balance"):
        parse_amount(text, "--balance")


def test_amounts_finer_than_the_ledger_counts_are_refused_and_not_rounded():
    assert parse_amount("0.000000000001", "--balance") == 1
    with pytest.raises(RequestError, match="decimals"):
        parse_amount("0.0000000000001", "--balance")


@pytest.mark.parametrize("value", ["-1", "NaN", "Infinity", "100001", "0.0000001"])
def test_impossible_prices_are_refused(value):
    with pytest.raises(RequestError, match="miss price"):
        Price(Decimal(1), Decimal(value), Decimal(1))


def test_a_table_of_ones_own_needs_no_dates(tmp_path):
    path = tmp_path / "home.toml"
    path.write_text(
        'currency = "EUR"\nsource = "electricity"\n[prices.small]\nhit = 0.0005\nmiss = "0.01"\noutput = 0.04\n'
    )
    table = find_table(str(path))
    price = table.price_of("small", datetime.now(UTC))
    assert (price.hit, price.miss, price.output, price.currency) == (
        Decimal("0.0005"), Decimal("0.01"), Decimal("0.04"), "EUR",
    )  # fmt: skip
    assert (table.name, table.models) == ("home", ["small"])


def test_a_dated_table_may_have_gaps_and_holidays(tmp_path):
    path = tmp_path / "own.json"
    path.write_text(
        """{"periods": [
            {"name": "b", "from": "2026-03-01", "prices": {"m": {"hit": 2, "miss": 2, "output": 2}},
             "peak": {"hours_utc": [[1, 2]], "weekdays": ["tue"], "holidays": ["2026-03-10"],
                      "prices": {"m": {"hit": 3, "miss": 3, "output": 3}}}},
            {"name": "a", "until": "2026-02-01T00:00+01:00", "prices": {"m": {"hit": 1, "miss": 1, "output": 1}}}]}"""
    )
    table = find_table(str(path))

    def hit(when: str):
        price = table.price_of("m", at(when))
        return price and int(price.hit)

    assert [hit("2026-01-31T22:59Z"), hit("2026-01-31T23:00Z"), hit("2026-02-28T23:59Z"), hit("2026-03-01T00:00Z")] == [
        1, None, None, 2,
    ]  # fmt: skip
    tuesday = at("2026-03-03T01:30Z")
    assert [int(table.price_of("m", tuesday + timedelta(days=7 * n)).hit) for n in range(3)] == [3, 2, 3]


GOOD = '"prices": {"m": {"hit": "1", "miss": "1", "output": "1"}}'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "the table is list"),
        ("{}", "has no prices"),
        ('{"prices": {}}', "is empty"),
        ('{"prices": {"m": {"hit": "1", "miss": "1"}}}', "output price of 'm' is missing"),
        ('{"prices": {"m": {"hit": "1", "miss": "x", "output": "1"}}}', "miss price of 'm' is 'x'"),
        ('{"prices": {"m": {"hit": "1", "miss": true, "output": "1"}}}', "miss price of 'm' is True"),
        ('{"prices": {"m": {"hit": "1", "miss": "-1", "output": "1"}}}', "miss price -1 is not allowed"),
        ('{"prices": {"m": {"hit": "1", "miss": NaN, "output": "1"}}}', "miss price of 'm'"),
        ('{"prices": {"m": {"input": "1"}}}', "unknown entry 'input'"),
        ('{"currency": "usd", GOOD}', "three capital letters"),
        ('{"price": 1, GOOD}', "unknown entry 'price'"),
        ('{"periods": [], "currency": "USD"}', "at least one period"),
        ('{"periods": [{GOOD}], GOOD}', "prices stands beside periods"),
        ('{"periods": [{"from": "2026-13-01", GOOD}]}', "is no date"),
        ('{"periods": [{"from": "2026-01-01T10:00", GOOD}]}', "no time zone"),
        ('{"periods": [{"from": "2026-01-01T10:00:30Z", GOOD}]}', "whole minute"),
        ('{"periods": [{"from": 2026, GOOD}]}', "give a date"),
        ('{"periods": [{"from": "0001-01-01T00:00+14:00", GOOD}]}', "is no date"),
        ('{"periods": [{"from": "2026-02-01", "until": "2026-01-01", GOOD}]}', "ends before it begins"),
        ('{"periods": [{"until": "2026-02-02", GOOD}, {"from": "2026-02-01", GOOD}]}', "overlap"),
        ('{"peak": {"hours_utc": [[1, 2]]}, GOOD}', "lacks prices"),
        ('{"peak": {"hours_utc": [[4, 1]], GOOD}, GOOD}', "hours run from 0 to 24"),
        ('{"peak": {"hours_utc": [[1]], GOOD}, GOOD}', "pairs of whole hours"),
        ('{"peak": {"hours_utc": 3, GOOD}, GOOD}', "is not a list"),
        ('{"peak": {"hours_utc": [[1, 2]], "weekdays": ["Monday"], GOOD}, GOOD}', "allowed are mon"),
        ('{"aliases": {"a": 1}, GOOD}', "aliases map names to names"),
    ],
)
def test_a_wrong_table_is_refused_with_its_name_and_what_is_wrong(tmp_path, text, said):
    path = tmp_path / "own.json"
    path.write_text(text.replace("GOOD", GOOD))
    with pytest.raises(RequestError, match=r"own\.json") as caught:
        find_table(str(path))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_table_that_is_not_there_is_refused_with_what_is(tmp_path):
    with pytest.raises(RequestError, match="hosted, launch"):
        find_table("no-such-table")
    with pytest.raises(RequestError, match="No such file"):
        find_table(str(tmp_path / "absent.toml"))
    (tmp_path / "bad.toml").write_bytes(b"a = \xff")
    with pytest.raises(RequestError, match="not valid TOML"):
        find_table(str(tmp_path / "bad.toml"))


def test_moments_are_dates_or_say_their_time_zone():
    assert parse_moment("2026-05-20") == datetime(2026, 5, 20, tzinfo=UTC)
    assert parse_moment("2026-05-20T08:00+08:00") == datetime(2026, 5, 20, tzinfo=UTC)
    for text in ("2026-05-20T08:00", "May", "", "2026-02-30"):
        with pytest.raises(RequestError):
            parse_moment(text)
