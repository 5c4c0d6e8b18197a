// Which commit the sources are; commit.cmake writes the definition at every build.
#pragma once

namespace tw::bindings {

extern const char* const commit;

}  // namespace tw::bindings
