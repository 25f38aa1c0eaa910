"""The list of tests that moved: by name, by likeness where a name stands twice, and by body where it changed."""

from support.moved_tests import cases_in, match

ONE = "def test_a():\n    assert f(1) == 2\n"
OTHER = "def test_a():\n    with open('x') as file:\n        assert file.read() == 'y'\n"
LONG = "    values = [g(i) for i in range(10)]\n    assert values == sorted(values)\n    assert len(values) == 10\n"


def test_of_two_with_one_name_the_more_alike_are_paired():
    old = [*cases_in("tests/test_x.py", ONE), *cases_in("tests/test_y.py", OTHER)]
    new = [*cases_in("tests/unit/test_p.py", OTHER), *cases_in("tests/unit/test_q.py", ONE)]
    homes, missing, fresh = match(old, new)
    assert {a.file: b.file for a, b in homes.items()} == {
        "tests/test_x.py": "tests/unit/test_q.py",
        "tests/test_y.py": "tests/unit/test_p.py",
    }
    assert not missing and not fresh


def test_a_renamed_test_is_found_by_its_body_and_a_lost_one_is_missing():
    old = [*cases_in("tests/test_x.py", f"def test_before():\n{LONG}"), *cases_in("tests/test_x.py", ONE)]
    new = list(
        cases_in(
            "tests/unit/test_x.py",
            f"@mark\ndef test_after():\n{LONG}\nclass TestMore:\n    def test_b(self):\n        pass\n",
        )
    )
    homes, missing, fresh = match(old, new)
    assert [(a.name, b.name) for a, b in homes.items()] == [("test_before", "test_after")]
    assert [t.name for t in missing] == ["test_a"] and [t.name for t in fresh] == ["TestMore::test_b"]
