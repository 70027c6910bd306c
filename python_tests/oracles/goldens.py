"""Worked examples and published counts, as data. Rows of a matrix are outputs."""

from __future__ import annotations

# --- SynFlow family: W1 [2, 3], W2 [2, 2], no bias, ReLU between, input ones ----------
PATH_WEIGHTS = ([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]], [[2.0, -1.0], [1.0, 4.0]])

#: method -> (p_net, p_score, R, S_1, S_2)
PATH_SCORES = {
    "synflow": (1, 1, 30.5, [[3.0, 6.0, 1.5], [0.0, 15.0, 5.0]], [[7.0, 4.0], [3.5, 16.0]]),
    "synflow_l2_a": (
        2,
        2,
        196.25,
        [[5.0, 20.0, 1.25], [0.0, 153.0, 17.0]],
        [[21.0, 10.0], [5.25, 160.0]],
    ),
    "synflow_l2_b": (1, 2, 30.5, [[3.0, 12.0, 0.75], [0.0, 45.0, 5.0]], [[14.0, 4.0], [3.5, 64.0]]),
    "synflow_l2_c": (
        2,
        1,
        196.25,
        [[5.0, 10.0, 2.5], [0.0, 51.0, 17.0]],
        [[10.5, 10.0], [5.25, 40.0]],
    ),
}

#: LogSynFlow scores of the same network, four decimals.
LOG_SYNFLOW = (
    [[1.3863, 2.7726, 0.6931], [0.0, 5.3753, 1.7918]],
    [[3.0082, 1.6094], [1.5041, 6.4378]],
)

#: SynFlow at sparsity .6, one round: the scores that stay, under both selection rules.
SYNFLOW_KEPT_AT_60 = [6.0, 7.0, 15.0, 16.0]

# --- DPaI: two linear layers given by their masks, input (1, 1, 1) ----------
DPAI_MASKS = ([[1, 0, 1], [0, 0, 1]], [[1, 1], [0, 0]])
DPAI_PATHS = 3.0
DPAI_INCOMING = ([2.0, 1.0], [3.0, 0.0])  # P_l = Z_l
DPAI_OUTGOING = ([1.0, 1.0], [1.0, 1.0])  # G_l
DPAI_GRADIENTS = ([[1 / 3] * 3, [1 / 3] * 3], [[2 / 3, 1 / 3], [2 / 3, 1 / 3]])  # q_l
DPAI_NODES = (2, 1)
DPAI_KERNELS = 5
DPAI_WEIGHTS = 5
#: u with alpha .99, beta .5: live kernel .01, dead kernel of a live node .505, dead node 1.
DPAI_UPDATE_WEIGHTS = ([[0.01, 0.505, 0.01], [0.505, 0.505, 0.01]], [[0.01, 0.01], [1.0, 1.0]])

# --- ERK quotas, published rounding ----------
LENET300_SHAPES = [(300, 784), (100, 300), (10, 100)]
LENET300_QUOTAS = {0.9: [18715, 6906, 1000], 0.95: [9052, 3341, 919]}

#: Counts in the order conv1, conv2, shortcut of each block.
RESNET20_QUOTAS_90 = [
    425,
    *[646] * 6,
    *[918, 1190, 512, *[1190] * 4],
    *[1733, 2277, 1665, *[2277] * 4],
    640,
]
VGG19_QUOTAS_90 = [1728, 24886, 36772, 48658, 72429, *[96200] * 3, 143743, *[191286] * 7, 51200]

# --- Published DPaI on a random ERK start: (J, log R_P, nodes, kernels, weights or None) ---
#: These depend on the draw of the scores; tests allow the stated band around them.
DPAI_START = {
    ("resnet20", 0.98): (58.4106, 42.0473, 792, 4970, 5417),
    ("resnet20", 0.90): (92.4324, 73.7145, 794, 18511, 27104),
    ("vgg19_bn", 0.98): (72.4809, 72.4809, 5604, 366641, None),
}

# --- Gradient family: W, no bias, x = (1, 2), label 0, cross-entropy ----------
GRADIENT_WEIGHT = [[1.0, 0.0], [0.5, 2.0]]
GRADIENT_LOSS = 3.529750418
#: method, options -> scores
GRADIENT_SCORES: list[tuple[str, dict[str, float], list[list[float]]]] = [
    ("snip", {}, [[0.9706877692, 0.0], [0.4853438846, 3.8827510770]]),
    ("itersnip", {}, [[0.9706877692, 0.0], [0.4853438846, 3.8827510770]]),
    ("force", {}, [[0.9706877692, 0.0], [0.4853438846, 3.8827510770]]),
    ("grasp_it", {}, [[0.9422347453, 3.7689389812], [0.9422347453, 3.7689389812]]),
    ("grasp", {"temperature": 1.0}, [[-0.2761900228, 0.0], [0.1380950114, 1.1047600911]]),
    ("grasp", {}, [[-1.5760508566e-7, 0.0], [7.880254283e-8, 6.304203426e-7]]),
    ("crop", {}, [[0.2761900228, 0.0], [0.1380950114, 1.1047600911]]),
]
