"""The papers of the methods, for model cards."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ADJOINT_MATCHING", "EFFICIENT_ADJOINT_MATCHING", "REINFORCE_ADJOINT_MATCHING", "Paper"]


@dataclass(frozen=True)
class Paper:
    """A paper.

    Args:
        method: name of its method.
        arxiv: arXiv number.
        bibtex: BibTeX entry.
    """

    method: str
    arxiv: str
    bibtex: str

    @property
    def url(self) -> str:
        """Its page on arXiv."""
        return f"https://arxiv.org/abs/{self.arxiv}"


ADJOINT_MATCHING = Paper(
    method="Adjoint Matching",
    arxiv="2409.08861",
    bibtex="""@inproceedings{domingoenrich2025adjoint,
  title     = {Adjoint Matching: Fine-tuning Flow and Diffusion Generative Models with Memoryless Stochastic Optimal Control},
  author    = {Domingo-Enrich, Carles and Drozdzal, Michal and Karrer, Brian and Chen, Ricky T. Q.},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
  url       = {https://arxiv.org/abs/2409.08861}
}""",
)

EFFICIENT_ADJOINT_MATCHING = Paper(
    method="Efficient Adjoint Matching",
    arxiv="2605.11480",
    bibtex="""@misc{shin2026efficient,
  title         = {Efficient Adjoint Matching for Fine-tuning Diffusion Models},
  author        = {Shin, Jeongwoo and Shin, Dongsoo and Zhu, Yuchen and Guo, Wei and Chen, Yongxin
                   and Lee, Joonseok and Choi, Jaewoong and Choi, Jaemoo},
  year          = {2026},
  eprint        = {2605.11480},
  archivePrefix = {arXiv},
  url           = {https://arxiv.org/abs/2605.11480}
}""",
)

REINFORCE_ADJOINT_MATCHING = Paper(
    method="Reinforce Adjoint Matching",
    arxiv="2605.10759",
    bibtex="""@misc{bergmeister2026reinforce,
  title         = {Reinforce Adjoint Matching: Scaling {RL} Post-Training of Diffusion and Flow-Matching Models},
  author        = {Bergmeister, Andreas and Jegelka, Stefanie and N{\\"u}sken, Nikolas and Domingo-Enrich, Carles
                   and Pidstrigach, Jakiw},
  year          = {2026},
  eprint        = {2605.10759},
  archivePrefix = {arXiv},
  url           = {https://arxiv.org/abs/2605.10759}
}""",
)

TILT_MATCHING = Paper(
    method="Tilt Matching",
    arxiv="2512.21829",
    bibtex="""@misc{potaptchik2025tilt,
  title         = {Tilt Matching for Scalable Sampling and Fine-Tuning},
  author        = {Potaptchik, Peter and Lee, Cheuk-Kit and Albergo, Michael S.},
  year          = {2025},
  eprint        = {2512.21829},
  archivePrefix = {arXiv},
  url           = {https://arxiv.org/abs/2512.21829}
}""",
)
