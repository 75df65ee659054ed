"""What `moe-surgery bench` measures, as suites of pytest-benchmark: to compare one state of the code with another.

    pytest benchmarks/suites                                  # on the embedded model
    pytest benchmarks/suites/test_decode.py --checkpoint=DIR  # on another checkpoint
    pytest benchmarks/suites --benchmark-json=FILE            # with what was counted: rates, bytes, acceptance

Cases run one after the other, so a machine that others use may favour one: for ratios between cases take
`bench`, which measures them in turns. Pruning has `cp` beside it in every round here too.
"""
