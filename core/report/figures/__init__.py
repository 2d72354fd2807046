"""The figures of a report: each function takes the record of a run and draws one figure."""
