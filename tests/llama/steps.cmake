# Adds the test program to llama.cpp's own build: passed as CMAKE_PROJECT_llama.cpp_INCLUDE.
add_executable(palu-steps ${CMAKE_CURRENT_LIST_DIR}/steps.cpp)
target_link_libraries(palu-steps PRIVATE llama)
target_compile_features(palu-steps PRIVATE cxx_std_17)
set_target_properties(palu-steps PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)

# Ablations: llama-perplexity with functions of examples/ablations.rs between llama.cpp and the C ABI. Only made when asked for:
# cargo build --release --example ablations comes first.
add_executable(llama-perplexity-ablations EXCLUDE_FROM_ALL ${CMAKE_CURRENT_LIST_DIR}/ablations.cpp)
get_filename_component(palu_lib_dir "${LLAMA_PALU_LIB}" DIRECTORY)
target_link_libraries(llama-perplexity-ablations PRIVATE llama-perplexity-impl llama ${palu_lib_dir}/examples/libablations.a)
foreach(name proj_load proj_free layer_create store attn attn_n_chunk attn_combine)
    target_link_options(llama-perplexity-ablations PRIVATE -Wl,--wrap=palu_${name})
endforeach()
target_compile_features(llama-perplexity-ablations PRIVATE cxx_std_17)
set_target_properties(llama-perplexity-ablations PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
