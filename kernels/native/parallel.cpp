#include "parallel.h"

namespace lorikeet {
StartTeam start_team = nullptr;
}

LORIKEET_EXPORT void lorikeet_set_team(void* start_team) {
    lorikeet::start_team = reinterpret_cast<lorikeet::StartTeam>(start_team);
}
