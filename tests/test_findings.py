"""Findings: the newest version of each annotation counts, whichever process comes first, and memory is bounded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from backend import findings as module
from backend.findings import Finding, Findings, digest_of, version_of

CROSSES = Finding("self-crossing", "the outline crosses itself", task=5, annotation=7, region="a")
OUTSIDE = Finding("outside", "reaches beyond the border", task=5, annotation=7, region="b")


@pytest.fixture
def findings(tmp_path: Path) -> Findings:
    return Findings(tmp_path)


def test_nothing_is_written_before_something_is_kept(findings: Findings, tmp_path: Path):
    assert (findings.recent(), findings.counts(), findings.own_write(1).digest) == ([], {}, "")
    assert list(tmp_path.iterdir()) == []


def test_what_is_new_is_told_once(findings: Findings):
    assert findings.put(7, 5, "3.17", 10.0, [CROSSES]) == [CROSSES]
    assert findings.put(7, 5, "3.17", 11.0, [CROSSES, OUTSIDE]) == [OUTSIDE]
    assert findings.counts() == {"self-crossing": 1, "outside": 1}
    assert [kept.finding for kept in findings.recent()] == [CROSSES, OUTSIDE]
    assert findings.recent()[0].project == "3.17"


def test_a_version_that_comes_late_does_not_count(findings: Findings):
    findings.put(7, 5, "3", 11.0, [])
    assert findings.put(7, 5, "3", 10.0, [CROSSES]) is None
    assert findings.recent() == []


def test_deleted_annotations_and_tasks_have_no_findings_whatever_comes_late(findings: Findings):
    for number in (7, 8, 9):
        findings.put(number, number, "3", 10.0, [CROSSES])
    findings.remove(annotations=[7])
    findings.remove(tasks=[8])
    findings.remove(annotations=[100])
    assert len(findings.recent()) == 1
    assert [findings.put(number, number, "3", 12.0, [CROSSES]) for number in (7, 8, 100)] == [None] * 3


def test_the_oldest_go_first_and_sound_ones_before_them(findings: Findings, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_ANNOTATIONS", 3)
    findings.put(1, 1, "3", 1.0, [CROSSES])
    findings.put(2, 2, "3", 1.0, [])
    for number in (3, 4, 5):
        findings.put(number, number, "3", 1.0, [Finding("outside", "…", annotation=number, region="a")])
    assert [kept.finding.annotation for kept in findings.recent()] == [5, 4, 3]


def test_the_findings_of_one_annotation_are_bounded(findings: Findings):
    many = [Finding("outside", "…", region=str(number)) for number in range(500)]
    assert len(findings.put(1, 1, "3", 1.0, many) or []) == 500
    assert len(findings.recent(1000)) == module.MAX_OF_ONE


def test_another_process_sees_and_clears_them(findings: Findings, tmp_path: Path):
    findings.put(7, 5, "3", 10.0, [CROSSES])
    code = (
        "import sys; from pathlib import Path; from backend.findings import Findings\n"
        "kept = Findings(Path(sys.argv[1]))\n"
        "print(len(kept.recent()), kept.put(7, 5, '3', 11.0, []))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "[]"]
    assert findings.recent() == []


def test_a_file_that_cannot_be_used_costs_the_findings_alone(tmp_path: Path):
    (tmp_path / "findings.sqlite3").write_bytes(b"no database" * 100)
    findings = Findings(tmp_path)
    assert findings.put(7, 5, "3", 10.0, [CROSSES]) == [CROSSES]
    assert (findings.recent(), findings.counts()) == ([], {})
    findings.remove(annotations=[7])


def test_what_we_write_is_known_again(findings: Findings):
    annotation = {"result": [{"id": "a", "value": {"points": [[1, 2.5]]}}], "updated_at": "2026-03-02T09:21:30.500000Z"}
    findings.will_write(7, digest_of(annotation), base_version=9.0)
    assert findings.own_write(7).digest == digest_of({**annotation, "was_cancelled": False, "lead_time": 4})
    assert findings.own_write(7).version > version_of(annotation) > 0
    findings.has_written(7, version_of(annotation))
    assert findings.own_write(7).version == version_of(annotation)
    assert digest_of({**annotation, "ground_truth": True}) != digest_of(annotation)
    # Written before it was ever checked, it still takes findings.
    assert findings.put(7, 5, "3", 1.0, [CROSSES]) == [CROSSES]


@pytest.mark.parametrize("text", [None, "", "noon", 7])
def test_a_time_that_cannot_be_read_is_older_than_any(text: object):
    assert version_of({"updated_at": text}) == 0.0


def test_a_finding_says_where_it_is():
    assert str(CROSSES) == "task 5, annotation 7, region a: the outline crosses itself"
    assert str(Finding("schema", "no feature has a label")) == "no feature has a label"
    assert str(Finding("label", "has no label", 4)) == "feature 4: has no label"
