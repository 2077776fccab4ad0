"""The statements N1…N17: what the derivation of the diffusion ELBO says, in the order in which it says it."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Statement:
    """One statement: its tag, the words, the same in LaTeX, and what had to be corrected in the notes, if anything."""

    tag: str
    text: str
    latex: str
    erratum: str | None = None


_CHAIN = r"\prod_{t=1}^{T} \frac{p(x^{(t-1)} \mid x^{(t)})}{q(x^{(t)} \mid x^{(t-1)})}"

STATEMENTS: tuple[Statement, ...] = (
    Statement(
        "N1",
        "q carries the data distribution q(x_0) to q(x_T) = N(0, I)",
        r"q(x^{(0)}) \longrightarrow q(x^{(T)}) = \mathcal N(0, I)",
        "holds exactly only as ∏(1−β_t) → 0; at finite T its cost is the ELBO's prior term KL(q(x_T|x_0) ‖ p(x_T))",
    ),
    Statement(
        "N2",
        "q is first-order Markov: q(x_t | x_{t-1}, …, x_0) = q(x_t | x_{t-1})",
        r"q(x^{(t)} \mid x^{(t-1)}, \dots, x^{(0)}) = q(x^{(t)} \mid x^{(t-1)})",
    ),
    Statement(
        "N3",
        "q(x_t | x_{t-1}) = N(√(1−β_t)·x_{t-1}, β_t·I)",
        r"q(x^{(t)} \mid x^{(t-1)}) = \mathcal N(\sqrt{1-\beta_t}\, x^{(t-1)}, \beta_t I)",
    ),
    Statement("N4", "β_t is a learnable parameter", r"\partial K / \partial \beta_t"),
    Statement(
        "N5",
        "q(x_0…x_T) = q(x_0) ∏_t q(x_t | x_{t-1})",
        r"q(x^{(0 \dots T)}) = q(x^{(0)}) \prod_{t=1}^{T} q(x^{(t)} \mid x^{(t-1)}) \quad (1)",
        "the first line of (1) conditions x_T on x_0…x_T; it is x_0…x_{T-1}",
    ),
    Statement(
        "N6",
        "for small steps q(x_{t-1} | x_t) has the form of q(x_t | x_{t-1}) (Feller)",
        r"\beta_t \to 0:\ q(x^{(t-1)} \mid x^{(t)}) \to \mathcal N",
        "the label (A) is used twice, here and in N9; Feller's paper is of 1949",
    ),
    Statement(
        "N7",
        "p runs from p(x_T) = N(0, I) to the data distribution",
        r"p(x^{(T)}) = \mathcal N(0, I) \longrightarrow p(x^{(0)})",
        "the arrow is labelled as starting from p(x_t); it starts from p(x_T)",
    ),
    Statement(
        "N8",
        "p is first-order Markov with p(x_{t-1} | x_t) = N(f_μ(x_t, t), f_Σ(x_t, t))",
        r"p(x^{(t-1)} \mid x^{(t)}) = \mathcal N(f_\mu(x^{(t)}, t), f_\Sigma(x^{(t)}, t))",
    ),
    Statement(
        "N9",
        "L = ∫ q(x_0) log p(x_0) dx_0 is maximised",
        r"L = \int q(x^{(0)}) \log p(x^{(0)})\, dx^{(0)}",
        "the label (A) is used twice, here and in N6",
    ),
    Statement(
        "N10",
        "the parameters of q and of p are found so that L, through its bound K, is largest",
        r"\partial K / \partial (\beta, f_\mu, f_\Sigma)",
    ),
    Statement(
        "N11",
        "q(x_0) is not known explicitly, only samples of it are",
        r"L \approx \frac1N \sum_n \log p(x_n^{(0)})",
    ),
    Statement(
        "N12",
        "p(x_0) = ∫ p(x_0…x_T) dx_1…x_T",
        r"p(x^{(0)}) = \int p(x^{(0 \dots T)})\, dx^{(1 \dots T)} \quad (2)",
    ),
    Statement(
        "N13",
        "p(x_0…x_T) = p(x_T) ∏_t p(x_{t-1} | x_t)",
        r"p(x^{(0 \dots T)}) = p(x^{(T)}) \prod_{t=1}^{T} p(x^{(t-1)} \mid x^{(t)}) \quad (3)",
        "(3) is printed with p(x_0) where p(x_T) must stand in front of the product",
    ),
    Statement(
        "N14",
        "p(x_0) = E_q[p(x_T) ∏_t p(x_{t-1} | x_t) / q(x_t | x_{t-1})]",
        rf"p(x^{{(0)}}) = \mathbb E_{{q(x^{{(1 \dots T)}} \mid x^{{(0)}})}}\Big[ p(x^{{(T)}}) {_CHAIN} \Big] \quad (4)",
        "(4) is printed with p(x_0) where p(x_T) must stand in front of the product",
    ),
    Statement(
        "N15",
        "L = ∫ q(x_0) log E_q[p(x_T) ∏_t p(x_{t-1} | x_t) / q(x_t | x_{t-1})] dx_0",
        rf"L = \int q(x^{{(0)}}) \log \mathbb E_q\Big[ p(x^{{(T)}}) {_CHAIN} \Big] dx^{{(0)}}",
        "printed with q(x_1) and dx_1; it is q(x_0) and dx_0",
    ),
    Statement(
        "N16",
        "Jensen: f(s·x + (1−s)·y) ≤ s·f(x) + (1−s)·f(y) for convex f and s in [0, 1]",
        r"f(s x + (1-s) y) \le s f(x) + (1-s) f(y)",
        "stated for convex f; log is concave, so the sign turns when it is applied",
    ),
    Statement(
        "N17",
        "L ≥ K = E_q[log p(x_T) + Σ_t log p(x_{t-1} | x_t) − Σ_t log q(x_t | x_{t-1})]",
        r"L \ge K = \mathbb E_q\Big[ \log p(x^{(T)}) + \sum_t \log p(x^{(t-1)} \mid x^{(t)}) "
        r"- \sum_t \log q(x^{(t)} \mid x^{(t-1)}) \Big]",
        "the notes stop at N16; this is the step that they lead to",
    ),
)

_OF_BITS = {
    "N1": (
        "q carries the data distribution q(x_0) to q(x_T) = Bernoulli(π) of each bit",
        r"q(x^{(0)}) \longrightarrow q(x^{(T)}) = \mathcal B(\pi)",
    ),
    "N3": (
        "q(x_t | x_{t-1}) = Bernoulli(x_{t-1}·(1−β_t) + π·β_t) of each bit",
        r"q(x^{(t)} \mid x^{(t-1)}) = \mathcal B(x^{(t-1)} (1-\beta_t) + \pi \beta_t)",
    ),
    "N6": (
        "for small steps q(x_{t-1} | x_t) has the form of q(x_t | x_{t-1}), a product of Bernoullis (Feller)",
        r"\beta_t \to 0:\ q(x^{(t-1)} \mid x^{(t)}) \to \prod_i \mathcal B",
    ),
    "N7": (
        "p runs from p(x_T) = Bernoulli(π) of each bit to the data distribution",
        r"p(x^{(T)}) = \mathcal B(\pi) \longrightarrow p(x^{(0)})",
    ),
    "N8": (
        "p is first-order Markov with p(x_{t-1} | x_t) a distribution of bits, of rates f_μ(x_t, t) and covariance f_Σ",
        r"p(x^{(t-1)} \mid x^{(t)}) = \mathcal B(f_\mu(x^{(t)}, t)) \text{ or a mixture of such}",
    ),
}
STATEMENTS_OF_BITS: tuple[Statement, ...] = tuple(
    replace(one, text=_OF_BITS[one.tag][0], latex=_OF_BITS[one.tag][1]) if one.tag in _OF_BITS else one
    for one in STATEMENTS
)
