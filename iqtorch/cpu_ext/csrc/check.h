// Errors without a source line in them; Python sees ValueError, IndexError and RuntimeError.
#pragma once
#include <sstream>
#include <stdexcept>

namespace iqtorch {

template <class Error, class... Parts> [[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  ((text << parts), ...);
  throw Error(text.str());
}

}  // namespace iqtorch

#define IQ_CHECK_AS(error, condition, ...) \
  do {                                     \
    if (!(condition)) iqtorch::refuse<error>(__VA_ARGS__); \
  } while (false)
#define IQ_CHECK(condition, ...) IQ_CHECK_AS(std::invalid_argument, condition, __VA_ARGS__)
