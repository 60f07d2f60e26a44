// check_mma.cuh - checks and times what rebuilds rows; part of check.cu.

// Devices that the plans are made for: this one, then as if it had the shared memory of smaller ones, and few multiprocessors.
static std::vector<palu_cuda_device> planned_devices() {
    std::vector<palu_cuda_device> all = { device };
    for (int smem : { 166912, 101376, 65536 }) {
        palu_cuda_device d = device;
        d.smem_optin = smem;
        d.n_sm = smem == 101376 ? 1 : d.n_sm;
        all.push_back(d);
    }
    return all;
}

struct RebuildCase {
    const char * name;
    int n_head, hd, group_size;
    std::vector<int> ranks;
    int b0, b1;
    int n_rot, n_offs; // -1: values
    bool norm;
    int n_stream, n_kv;
    int align = 4;
    int planes = 1;
};

static void check_rebuild(const RebuildCase & c) {
    if (left_out(c.name)) {
        return;
    }
    const bool keys = c.n_rot >= 0;
    const Rope rope = make_rope(c.hd, std::max(0, c.n_rot), c.n_offs, c.norm, 10000.0f, c.norm ? 1.1f : 1.0f);
    Side s = make_side(c.n_head, c.hd, c.group_size, c.ranks, c.b0, c.b1, keys ? &rope.pair_dim : nullptr, false, c.align, c.planes);
    const int64_t n_cell = (int64_t) c.n_stream*c.n_kv;
    const int d_all = c.n_head*c.hd;
    const std::vector<uint8_t> rows = random_rows(s, n_cell);
    std::vector<int32_t> pos(n_cell);
    for (int32_t & i : pos) {
        i = (int32_t)(rng()%(1 << 20));
    }
    palu_cuda_rebuild p = {};
    p.side = s.dev;
    if (keys) {
        p.rope.pair_dim = upload(rope.pair_dim);
        p.rope.turn = upload(rope.turn);
        p.rope.mag = upload(rope.mag);
        p.pos = upload(pos);
    }
    p.rows = upload(rows);
    p.rows_nb_stream = (int64_t) c.n_kv*s.dev.row_bytes;
    p.n_stream = c.n_stream;
    p.n_kv = c.n_kv;

    std::vector<double> ref(n_cell*d_all);
    std::vector<std::thread> threads;
    const int n_thread = std::max(1u, std::thread::hardware_concurrency());
    for (int th = 0; th < n_thread; th++) {
        threads.emplace_back([&, th] {
            std::vector<double> code;
            for (int64_t t = th; t < n_cell; t += n_thread) {
                const uint8_t * row = &rows[t*s.dev.row_bytes];
                double * to = &ref[t*d_all];
                for (int h = 0; h < c.n_head; h++) {
                    const auto & g = s.groups[h/c.group_size];
                    if (h%c.group_size == 0) {
                        code.resize(g.rank);
                        for (int i = 0; i < g.rank; i++) {
                            code[i] = code_at(s, g, row, i) - ((1 << (s.segs[g.seg0 + i/8] >> 24)) - 1)*0.5;
                        }
                    }
                    for (int d = 0; d < c.hd; d++) {
                        double sum = 0;
                        for (int i = 0; i < g.rank; i++) {
                            sum += weight_at(s, g, h%c.group_size*c.hd + d, i, keys)*code[i];
                        }
                        to[h*c.hd + d] = (double) scale_at(g, row)*s.dec_scale[h*c.hd + d]*sum*(g.rank ? 1 : 0) + s.mean[h*c.hd + d];
                    }
                    for (int i = 0; i < c.hd/2 && keys; i++) {
                        const double turn = rope.freq[i]*pos[t];
                        const double a = 2*M_PI*(turn - std::floor(turn));
                        double & x = to[h*c.hd + rope.pair_dim[2*i]];
                        double & y = to[h*c.hd + rope.pair_dim[2*i + 1]];
                        const double x0 = x, y0 = y;
                        x = rope.mag[i]*(x0*std::cos(a) - y0*std::sin(a));
                        y = rope.mag[i]*(x0*std::sin(a) + y0*std::cos(a));
                    }
                }
            }
        });
    }
    for (auto & t : threads) {
        t.join();
    }
    double size = 0;
    for (const double x : ref) {
        size = std::max(size, std::fabs(x));
    }
    printf("%-58s", c.name);
    for (const palu_cuda_device & dev : planned_devices()) {
        palu_cuda_launch l;
        if (palu_cuda_plan_rebuild(&dev, &p, s.groups.data(), &l)) {
            printf("no plan\n");
            exit(2);
        }
        p.out = (uint16_t *) room(ref.size()*2);
        launch(l, p);
        std::vector<uint16_t> out(ref.size());
        CHECK(cudaMemcpy(out.data(), p.out, out.size()*2, cudaMemcpyDeviceToHost));
        std::vector<float> got(out.size());
        size_t n_off = 0; // by more than half a unit of the last place, and the rotation's 16 bits
        for (size_t i = 0; i < out.size(); i++) {
            __half h;
            memcpy(&h, &out[i], 2);
            got[i] = __half2float(h);
            n_off += !(std::fabs(got[i] - ref[i]) <= std::fabs(ref[i])*(1.02/2048) + size*(keys ? 5e-5 : 1e-6));
        }
        const double error = distance(got, ref);
        const bool ok = error < 4e-4 && n_off == 0;
        printf("  %s/%d/%d/%d %.1e%s", l.kernel + strlen(keys ? "palu_rebuild_keys_" : "palu_rebuild_values_"), p.slab, p.stages, p.n_split, error, ok ? "" : " WRONG");
        if (n_off) {
            printf(" %zu off", n_off);
        }
        n_wrong += !ok;
    }
    printf("\n");
    fflush(stdout);
    free_all();
}

// Median of n runs in microseconds, with events around each.
template <typename F> static float time_us(int n, F f) {
    cudaEvent_t e[2];
    CHECK(cudaEventCreate(&e[0]));
    CHECK(cudaEventCreate(&e[1]));
    std::vector<float> all;
    for (int i = -3; i < n; i++) {
        f(i + 3);
        CHECK(cudaEventRecord(e[0]));
        f(i + 3);
        CHECK(cudaEventRecord(e[1]));
        CHECK(cudaEventSynchronize(e[1]));
        float ms;
        CHECK(cudaEventElapsedTime(&ms, e[0], e[1]));
        if (i >= 0) {
            all.push_back(ms*1000);
        }
    }
    CHECK(cudaEventDestroy(e[0]));
    CHECK(cudaEventDestroy(e[1]));
    std::sort(all.begin(), all.end());
    return all[n/2];
}

static void bench_rebuild(const RebuildCase & c, bool every) {
    if (left_out(c.name) || (only_size && only_size != c.n_kv)) {
        return;
    }
    const bool keys = c.n_rot >= 0;
    const Rope rope = make_rope(c.hd, std::max(0, c.n_rot), c.n_offs, c.norm, 10000.0f, 1.0f);
    Side s = make_side(c.n_head, c.hd, c.group_size, c.ranks, c.b0, c.b1, keys ? &rope.pair_dim : nullptr, false, c.align, c.planes);
    palu_cuda_rebuild p = {};
    p.side = s.dev;
    if (keys) {
        p.rope.pair_dim = upload(rope.pair_dim);
        p.rope.turn = upload(rope.turn);
        p.rope.mag = upload(rope.mag);
        std::vector<int32_t> pos(c.n_kv);
        for (int i = 0; i < c.n_kv; i++) {
            pos[i] = i;
        }
        p.pos = upload(pos);
    }
    const std::vector<uint8_t> part = random_rows(s, 4096);
    uint8_t * rows = (uint8_t *) room((size_t) c.n_kv*s.dev.row_bytes);
    for (int t = 0; t < c.n_kv; t += 4096) {
        CHECK(cudaMemcpy(rows + (size_t) t*s.dev.row_bytes, part.data(), (size_t) std::min(4096, c.n_kv - t)*s.dev.row_bytes, cudaMemcpyHostToDevice));
    }
    p.rows = rows;
    p.n_stream = 1;
    p.n_kv = c.n_kv;
    p.out = (uint16_t *) room((size_t) c.n_kv*c.n_head*c.hd*2);
    palu_cuda_launch l;
    palu_cuda_plan_rebuild(&device, &p, s.groups.data(), &l);
    double ops = 0;
    for (const auto & g : s.groups) {
        ops += 2.0*g.rank*c.group_size*c.hd*c.n_kv*c.planes;
    }
    const double bytes = (double) c.n_kv*(s.dev.row_bytes + 2.0*c.n_head*c.hd);
    auto report = [&](const char * how) {
        const float us = time_us(20, [&](int) { launch(l, p); });
        printf("%-44s %7d  %s%s/%d/%d/%d  %8.1f us  %5.0f TOP/s  %5.2f TB/s  (floors: %5.1f us at 1979 TOP/s, %5.1f us at 4.3 TB/s)\n", c.name, c.n_kv, how,
            l.kernel + strlen("palu_rebuild_"), p.slab, p.stages, p.n_split, us, ops/us*1e-6, bytes/us*1e-6, ops/1979e6, bytes/4.3e6);
        fflush(stdout);
    };
    report("");
    for (int cells : { 128, 64, 32 }) {
        for (int stages : { 3, 2 }) {
            p.stages = stages;
            const size_t smem = rebuild_smem(&p, cells);
            if (every && smem <= (size_t) device.smem_optin) {
                rebuild_launch(&device, &p, cells, smem <= (size_t)(device.smem_optin + 1024)/2 - 1024 ? 2 : 1, &l);
                report("  ");
            }
        }
    }
    free_all();
}

static void check_all_rebuild() {
    //                                        heads hd group ranks       bits   rope          streams, cells
    check_rebuild({ "rebuild keys 8x128 joint, 448, NEOX",         8, 128, 8, {448}, 6, 3,  128, 0, false,  1, 1000 });
    check_rebuild({ "rebuild values 8x128 joint, 600",             8, 128, 8, {600}, 6, 3,  -1, 0, false,  1, 777 });
    check_rebuild({ "rebuild keys 32x128, groups of 4, NORM",      32, 128, 4, {128}, 4, 2,  128, 0, true,  2, 150, 16 });
    check_rebuild({ "rebuild values 32x128, groups of 4, 384",     32, 128, 4, {384}, 4, 2,  -1, 0, false,  2, 130 });
    check_rebuild({ "rebuild keys 4x64, mixed ranks, part NORM",   4, 64, 2, {248, 72}, 0, 0,  32, 16, true,  1, 333 });
    check_rebuild({ "rebuild keys 4x80, part NEOX",                4, 80, 4, {88}, 0, 0,  32, 0, false,  1, 129 });
    check_rebuild({ "rebuild keys 2x256, two planes",              2, 256, 2, {160}, 8, 1,  128, 0, false,  1, 200, 4, 2 });
    check_rebuild({ "rebuild values 2x256, two planes",            2, 256, 2, {480}, 8, 8,  -1, 0, false,  1, 200, 4, 2 });
    check_rebuild({ "rebuild keys 3x96, ranks 64, 0, 8",           3, 96, 1, {64, 0, 8}, 0, 0,  96, 0, false,  3, 65 });
    check_rebuild({ "rebuild values 3x192, ranks 0, 48, 24",       3, 192, 1, {0, 48, 24}, 0, 0,  -1, 0, false,  1, 1 });
    check_rebuild({ "rebuild keys 2x72, pairs across units",       2, 72, 2, {40}, 0, 0,  20, 3, true,  1, 99 });
    check_rebuild({ "rebuild keys 2x84, no RoPE",                  2, 84, 2, {40}, 0, 0,  0, 0, false,  1, 99 });
    check_rebuild({ "rebuild values 2x90",                         2, 90, 1, {40}, 0, 0,  -1, 0, false,  1, 99 });
    check_rebuild({ "rebuild keys 32x128 joint, rank 4096",        32, 128, 32, {4096}, 2, 1,  128, 0, false,  1, 70 });
    check_rebuild({ "rebuild values 32x128 joint, 3000, two planes", 32, 128, 32, {3000}, 8, 1,  -1, 0, false,  1, 70, 4, 2 });
}

static void bench_all_rebuild() {
    for (int n : { 512, 4096, 16384, 65536, 131072 }) {
        bench_rebuild({ "rebuild keys 8x128 joint, 448",              8, 128, 8, {448}, 6, 3,  128, 0, false,  1, n }, n == 65536);
        bench_rebuild({ "rebuild values 8x128 joint, 600",            8, 128, 8, {600}, 6, 3,  -1, 0, false,  1, n }, n == 65536);
    }
    bench_rebuild({ "rebuild keys 32x128, groups of 4, 128",          32, 128, 4, {128}, 4, 2,  128, 0, true,  1, 65536 }, true);
    bench_rebuild({ "rebuild values 32x128, groups of 4, 384",        32, 128, 4, {384}, 4, 2,  -1, 0, false,  1, 65536 }, true);
    bench_rebuild({ "rebuild keys 8x64 joint, 224",                   8, 64, 8, {224}, 6, 3,  64, 0, false,  1, 65536 }, true);
    bench_rebuild({ "rebuild keys 32x128 joint, rank 2048",           32, 128, 32, {2048}, 3, 1,  128, 0, true,  1, 16384 }, true);
    bench_rebuild({ "rebuild values 8x128 joint, 800, two planes",    8, 128, 8, {800}, 8, 5,  -1, 0, false,  1, 65536, 4, 2 }, true);
}
