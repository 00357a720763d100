"""The soak: publishers and workers under random faults for as long as one likes, and a strict verdict at the end.

plan        which fault happens when, to whom: a pure function of the seed
shop        the tasks of the workers
publisher   a process that publishes real, skewed keys and notes what became of each message
resharder   a process that gives a group another number of shards, and may die over it
servers     the broker, and the links to it
field       the groups, workers and publishers of one soak
faults      what each fault does to the field
verdict     what ran, compared with what was published; which repetitions a fault explains
run         one soak from its first fault to its verdict
"""
