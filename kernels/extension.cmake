# add_cpu_extension(NAME FOLDER): the Python module _cpu of csrc/*.cpp beside the caller, installed
# into FOLDER of the wheel.
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()
find_package(Python 3.11 COMPONENTS Interpreter Development.Module REQUIRED)
find_package(pybind11 CONFIG REQUIRED)
find_package(OpenMP COMPONENTS CXX)
set(SOFTGRPO_SHARED_HEADERS ${CMAKE_CURRENT_LIST_DIR}/csrc)

# The build needs no torch: the ops take pointers and sizes. At run time torch is imported first,
# so that libgomp.so.1 is torch's own and both share one thread pool.
function(add_cpu_extension NAME FOLDER)
  file(GLOB SOURCES CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/*.cpp)
  pybind11_add_module(${NAME} MODULE ${SOURCES})
  set_target_properties(${NAME} PROPERTIES OUTPUT_NAME _cpu CXX_STANDARD 17 CXX_STANDARD_REQUIRED ON CXX_EXTENSIONS OFF)
  target_include_directories(${NAME} PRIVATE csrc ${SOFTGRPO_SHARED_HEADERS})
  # No contraction anywhere: the noise must have the same bits on every back end, and a value must
  # not depend on which instruction set was chosen at run time.
  target_compile_options(${NAME} PRIVATE -O3 -fno-math-errno -ffp-contract=off -fvisibility=hidden -Wall -Wextra)
  if(OpenMP_CXX_FOUND)
    target_link_libraries(${NAME} PRIVATE OpenMP::OpenMP_CXX)
  endif()
  install(TARGETS ${NAME} DESTINATION ${FOLDER})
endfunction()
