"""A model whose heads are known: importances are found, and budgets win exactly where they should.

Everything as a user's own lines make it: curves of some prompts in a file, budgets solved from it,
chunks of other prompts made again under them, and the tests of the proof.
"""

import sys
from pathlib import Path

import pytest
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "calibration"))
from planted_network import FRAMES, REACH, bare_model, planted_model
from test_prove import prompts, ran

from lightning_kv.calibration.sites import SiteSettings
from lightning_kv.policies.head_curves import HeadCurves
from lightning_kv.tasks.calibrate import CalibrateModule
from lightning_kv.tasks.callbacks import CurveWriter, ProofWriter
from lightning_kv.tasks.prove import ProveBudgetsModule

SOME = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))]


def judged(folder, model):
    """Curves of six prompts, and the rows and the proof of twelve others, at half the reach."""
    file = folder / "heads.safetensors"
    measuring = SiteSettings(reach=REACH, scorers=("mass",), chunks=1, probes=4, exact=(0,))
    module = CalibrateModule(model, measuring, frames=FRAMES, validate=6, labels=False)
    ran(module, CurveWriter(file), prompts(folder, "fitted", 6))
    module = ProveBudgetsModule(model, file, (REACH // 2,), chunks=1, frames=FRAMES)
    found = ran(module, ProofWriter(folder / "proof"), prompts(folder, "others", 12))
    (own,) = found.means
    return HeadCurves.load(file), {row.rule: row.against for row in own.rows}, own.proof


@pytest.mark.parametrize("seed", SOME)
def test_planted_heads_are_found_and_budgets_by_them_win(tmp_path, seed):
    model, truth = planted_model(seed)
    curves, rows, proof = judged(tmp_path, model)
    history, whole = curves.importance["history"], curves.importance["zero"]
    blind = truth == 0
    assert float(history[blind].max()) < 1e-12 * float(history.max())
    known = history.masked_fill(blind, 0)  # they are ties, as they are in the truth
    assert spearmanr(known.flatten(), truth.flatten()).statistic >= 0.95
    # Whole heads taken away: what looks at the chunk alone seems to matter.
    assert float(whole[blind].min()) > float(whole[~blind].median())
    assert spearmanr(whole.flatten(), truth.flatten()).statistic < 0.5

    own = rows["optimal"]
    assert own.prompts == 12 and own.ratio < 0.7 and own.p < 0.01
    assert proof.verdict == "optimal" and proof.expected
    other = rows["focused-matched-zero"]
    assert not (other.ratio < 1 and other.p < 0.01)
    assert other.low > own.high and other.low > rows["focused-matched"].high


@pytest.mark.parametrize("seed", SOME)
def test_heads_that_are_drawn_have_no_structure_to_win_by(tmp_path, seed):
    curves, rows, proof = judged(tmp_path, bare_model(seed))
    history = curves.importance["history"]
    assert float(history.mean() / history.log().mean().exp()) < 1.2
    own = rows["optimal"]
    assert not (own.ratio < 1 and own.p < 0.01) and own.low > 0.85
    assert proof.verdict != "optimal" and not proof.expected
