"""The tables of the READMEs are what the commands beside them print."""

import glob
import re

import pytest

import conftest
from mach import main

TABLE = re.compile(r'```console\n\$ python mach/main\.py (.*)\n((?:.+\n)*)```')
SHOWN = [(path.parent.name, *found.groups())
         for path in sorted(conftest.ROOT.glob('**/README.md'))
         for found in TABLE.finditer(path.read_text(encoding='utf-8'))]


def test_there_are_such_tables():
    assert {folder for folder, *_ in SHOWN} >= {'asynchronous_kgraph'}


@pytest.mark.parametrize('folder, words, table', SHOWN)
def test_a_table_is_what_its_command_prints(monkeypatch, capsys, folder, words,
                                            table):
    del folder
    monkeypatch.chdir(conftest.ROOT)
    expanded = [sorted(glob.glob(word)) or [word] for word in words.split()]
    assert main.main(sum(expanded, [])) == 0
    assert capsys.readouterr().out == table
