#pragma once

// How many threads the parallel regions of csrc/cpu get from now on.
void set_team_size(int threads);
