"""``fastpref report`` as a person types it."""

import pytest

from fastpref.cli import main


def test_one_run_gets_its_page_in_its_folder(make_run, capsys):
    folder = make_run("run")
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    assert "<title>run" in (folder / "report.html").read_text()


def test_several_runs_get_theirs_here(make_run, tmp_path, monkeypatch, capsys):
    runs = [str(make_run(name)) for name in ("a", "b")]
    monkeypatch.chdir(tmp_path)
    assert main(["report", *runs]) == 0
    assert capsys.readouterr().out == "report.html\n"
    assert "2 runs compared" in (tmp_path / "report.html").read_text()


def test_the_page_goes_where_it_is_told(make_quickstart, tmp_path, capsys):
    folder, page = make_quickstart(), tmp_path / "pages" / "page.html"
    assert main(["report", "--output", str(page), str(folder)]) == 0
    assert capsys.readouterr().out == f"{page}\n" and page.exists()
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "need fastpref report RUN..., got no RUN"),
        (["{tmp}/nowhere"], "nowhere: need a run's folder (with metrics.jsonl)"),
        (["{tmp}"], "got run"),
        (["{tmp}/run", "--output", "{tmp}"], "cannot write"),
        (["{tmp}/run", "--outputs", "x"], "--outputs"),
        (["{tmp}/run", "{tmp}/run"], "need each run once"),
    ],
    ids=str,
)
def test_errors_are_one_message_and_no_trace(make_run, tmp_path, capsys, args, message):
    make_run("run")
    assert main(["report", *(arg.format(tmp=tmp_path) for arg in args)]) == 1
    out, err = capsys.readouterr()
    assert message in err and "Traceback" not in err and out == ""
