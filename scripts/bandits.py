"""The papers' experiments that need no language model: tabular softmax policies, trained to the optimum in float64.

The losses are those of `algos/`, on the log-probs of a few completions of one prompt. Each number that is known for a
setting, in closed form or worked out beforehand, is printed beside ours. If one disagrees, the exit code is 1. The
experiments are those of scripts/papers, and each paper has one figure in `--output-dir`:

    typo.png          TYPO: interpolation and preservation (Figs. 2, 3, 5, 6, appendix A)
    distillation.png  reward-model distillation, arXiv 2405.19316: Propositions 3 and 7, Theorems 1 and 2
    exo.png           EXO, arXiv 2402.00856: mode seeking (Fig. 1), the gradients of Eqs 16 and 20 at finite K

    python scripts/bandits.py --output-dir runs/bandits
"""

from scripts.lab.commands import checked_command
from scripts.papers import Args, distillation, exo, first_step, run_experiments, typo

SECTIONS = (
    *typo.SECTIONS,
    *distillation.SECTIONS,
    *exo.SECTIONS,
    *first_step.SECTIONS,
)
FIGURES = {
    **typo.FIGURES,
    **distillation.FIGURES,
    **exo.FIGURES,
}


def main(args: Args) -> None:
    run_experiments(args, SECTIONS, FIGURES)


if __name__ == "__main__":
    checked_command(main, Args)
