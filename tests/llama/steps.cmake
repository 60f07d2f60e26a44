# Adds the test program to llama.cpp's own build: passed as CMAKE_PROJECT_llama.cpp_INCLUDE.
add_executable(palu-steps ${CMAKE_CURRENT_LIST_DIR}/steps.cpp)
target_link_libraries(palu-steps PRIVATE llama)
target_compile_features(palu-steps PRIVATE cxx_std_17)
set_target_properties(palu-steps PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
