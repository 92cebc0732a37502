"""docs/pools.md: the script there makes a pool that is read and learned from."""

import csv
import random
import re
import subprocess
import sys
from pathlib import Path

from routers.records import read_records

DOC = Path(__file__).parents[2] / "docs" / "pools.md"


def test_the_script_makes_a_pool_that_can_be_learned_from(tmp_path):
    draw = random.Random(0)
    with (tmp_path / "graded.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["question", "task", "expert", "answer", "score"])
        for number in range(40):
            for expert in ("a", "b"):
                table.writerow([f'What is "{number}", plus\n1?', "sums", expert, number + 1, draw.randint(0, 1)])
    (script,) = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    records = read_records(tmp_path / "pool")
    assert records.expert_ids == ("a", "b")
    assert len(records.lessons("train")) == 28
    assert len(records.rows("test")) == 12
    assert records.answered_QE.all()
    assert records.texts[0] == 'What is "0", plus\n1?'
