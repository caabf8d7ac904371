"""The paper's Table 1 and its three scenarios on any study list, beside the options beyond the paper."""
