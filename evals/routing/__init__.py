"""collegium eval routing: do routers beat the best single expert, on recorded answers? bench.py is the whole flow."""
