"""Files of requests, answered engine by engine: ``collegium batch run`` and ``/v1/batches``.

source     the input file, read line by line in constant memory
lines      what a line says: OpenAI's batch format, checked
store      one SQLite file that knows what was decided, answered and settled; a killed batch goes on from it
plan       every line checked and routed, before any engine is asked
work       calls, each engine's together; spares for what fails
combine    a line's answers into its one output line
runner     the stages in one place. READ FIRST
output     the output files, whole or not at all
"""
