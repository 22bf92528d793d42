"""What numbers of fewer bits may change: one table for all exporters, so that formats can be compared.

The largest difference is that of the worst of all logits, so it is wide where few bits are left; what counts there is whether
rows are answered as before. Four bits often fail on small models: then the receipt says so, and the files are kept.
"""

from __future__ import annotations

from tune_magic.exporters.parity import Limits

HALF = Limits(logit_share=0.01, changed_share=0.02, lost_share=0.01, spare_rows=1)
BRAIN = Limits(logit_share=0.05, changed_share=0.05, lost_share=0.01, spare_rows=1)  # 8 bits of precision, half has 11
EIGHT_BITS = Limits(logit_share=0.2, changed_share=0.1, lost_share=0.02, spare_rows=1)
FIVE_BITS = Limits(logit_share=0.25, changed_share=0.1, lost_share=0.02, spare_rows=1)
FOUR_BITS = Limits(logit_share=0.3, changed_share=0.1, lost_share=0.02, spare_rows=1)
