// check_mma.cuh - checks and times what stores, what rebuilds rows, and decoding with the warps' matrix instructions; part of
// check.cu.

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

// The same for a CUDA graph of what f puts on a stream.
template <typename F> static float time_graph_us(int n, F f) {
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK(cudaStreamCreate(&stream));
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    f(stream);
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    const float us = time_us(n, [&](int) { CHECK(cudaGraphLaunch(exec, 0)); });
    CHECK(cudaGraphExecDestroy(exec));
    CHECK(cudaGraphDestroy(graph));
    CHECK(cudaStreamDestroy(stream));
    return us;
}

//
// Store
//

struct StoreCase {
    const char * name;
    int n_head, hd, group_size;
    std::vector<int> ranks;
    int b0, b1, n_token;
    int gap = 0;  // floats between the heads of a token, and between tokens
    int skew = 0; // floats before the first
};

static void check_store(const StoreCase & c) {
    if (left_out(c.name)) {
        return;
    }
    Side s = make_side(c.n_head, c.hd, c.group_size, c.ranks, c.b0, c.b1, nullptr, true, 4);
    const int n_row = c.n_token + 5;
    const size_t nb_head = c.hd + c.gap, nb_token = c.n_head*nb_head + c.gap;
    std::vector<float> x(c.skew + c.n_token*nb_token, NAN);
    auto at = [&](int t, int h, int i) -> float & { return x[c.skew + t*nb_token + h*nb_head + i]; };
    const int bad = c.n_token > 2 ? 2 : -1;
    for (int t = 0; t < c.n_token; t++) {
        for (int h = 0; h < c.n_head; h++) {
            for (int i = 0; i < c.hd; i++) {
                at(t, h, i) = (t%7 == 6 ? 1e6f : t%7 == 5 ? 1e-6f : 2.0f)*gauss();
            }
        }
    }
    if (bad >= 0) {
        at(bad, 0, 3) = c.n_token%2 ? NAN : INFINITY;
    }
    std::vector<int64_t> idxs(n_row);
    for (int i = 0; i < n_row; i++) {
        idxs[i] = i;
    }
    std::shuffle(idxs.begin(), idxs.end(), rng);
    palu_cuda_store both = {}; // keys and values: the same twice, so both ways to tell them apart are used
    palu_cuda_stored p = {};
    p.side = s.dev;
    p.x = upload(x) + c.skew;
    p.x_nb_head = nb_head*4;
    p.x_nb_token = nb_token*4;
    p.idxs = upload(idxs);
    both.n_side = 2;
    both.n_token = c.n_token;

    // latents in double precision
    std::vector<double> latent((size_t) c.n_token*s.dev.rank_sum);
    std::vector<std::thread> threads;
    const int n_thread = std::max(1u, std::thread::hardware_concurrency());
    for (int th = 0; th < n_thread; th++) {
        threads.emplace_back([&, th] {
            for (int t = th; t < c.n_token; t += n_thread) {
                for (int g = 0; g < s.dev.n_group; g++) {
                    const auto & group = s.groups[g];
                    const int d = c.group_size*c.hd;
                    for (int i = 0; i < group.rank; i++) {
                        double z = 0;
                        for (int j = 0; j < d; j++) {
                            __half e;
                            memcpy(&e, &s.enc[group.enc0 + (int64_t) i*d + j], 2);
                            z += (double) __half2float(e)*((double) at(t, g*c.group_size + j/c.hd, j%c.hd) - s.mean[g*d + j]);
                        }
                        latent[(size_t) t*s.dev.rank_sum + group.step0 + i] = z;
                    }
                }
            }
        });
    }
    for (auto & t : threads) {
        t.join();
    }

    printf("%-58s", c.name);
    std::vector<palu_cuda_device> devices = { device, device };
    // the other way to project, and the other ways to quantize
    devices[1].arch = 75;
    devices[1].n_sm = 1 << 20;
    devices.push_back(device);
    devices[2].n_sm = (c.n_token*s.dev.n_group + 1)/2;
    devices.push_back(device);
    devices[3].n_sm = 1;
    const size_t n_way = devices.size();
    if (c.n_token <= PALU_CUDA_PROJECT_TOKENS) {
        devices.push_back(device); // by one kernel, which leaves its counters as they were
    }
    for (size_t way = 0; way < devices.size(); way++) {
        const palu_cuda_device & dev = devices[way];
        const bool few = way == n_way;
        const std::vector<uint32_t> zeros(2*s.dev.n_group);
        both.beside = few ? STORE_FEW_FROM_CELLS : 0;
        both.done = few ? upload(zeros) : nullptr;
        p.rows = (uint8_t *) room((size_t) n_row*s.dev.row_bytes);
        const size_t n_latent = (size_t) c.n_token*s.dev.rank_sum;
        const size_t n_bytes = (size_t) n_row*s.dev.row_bytes;
        p.latent = (float *) room(n_latent*4);
        both.of[0] = both.of[1] = p;
        both.of[1].latent = (float *) room(n_latent*4);
        both.of[1].rows = (uint8_t *) room(n_bytes);
        palu_cuda_launch l[2];
        if (palu_cuda_plan_store(&dev, &both, l)) {
            printf("no plan\n");
            exit(2);
        }
        bool ok = few ? !l[0].kernel && !strcmp(l[1].kernel, "palu_store_few") : l[0].kernel != nullptr;
        launch(l[0], both);
        launch(l[1], both);
        if (few) {
            launch(l[1], both);
            std::vector<uint32_t> done(zeros.size(), 1);
            CHECK(cudaMemcpy(done.data(), both.done, done.size()*4, cudaMemcpyDeviceToHost));
            ok &= done == zeros;
        }
        std::vector<uint8_t> rows((size_t) n_row*s.dev.row_bytes);
        std::vector<float> z(latent.size());
        CHECK(cudaMemcpy(rows.data(), p.rows, rows.size(), cudaMemcpyDeviceToHost));
        CHECK(cudaMemcpy(z.data(), p.latent, z.size()*4, cudaMemcpyDeviceToHost));
        // the same search in double precision; codes next to a rounding boundary may differ
        size_t n_code = 0, n_diff = 0;
        int n_scale = 0;
        double worst = 0; // of a latent's relative error
        std::vector<uint8_t> rows2(n_bytes);
        CHECK(cudaMemcpy(rows2.data(), both.of[1].rows, n_bytes, cudaMemcpyDeviceToHost));
        ok &= rows == rows2;
        for (int t = 0; t < c.n_token; t++) {
            const uint8_t * row = &rows[idxs[t]*s.dev.row_bytes];
            for (int g = 0; g < s.dev.n_group; g++) {
                const auto & group = s.groups[g];
                if (t == bad && g == 0) {
                    ok &= std::isnan(scale_at(group, row));
                    continue;
                }
                const double * ref = &latent[(size_t) t*s.dev.rank_sum + group.step0];
                std::vector<double> y(group.rank), half(group.rank), w(group.rank);
                double top = 0, e2 = 0, z2 = 0;
                for (int i = 0; i < group.rank; i++) {
                    const double e = z[(size_t) t*s.dev.rank_sum + group.step0 + i] - ref[i];
                    e2 += e*e;
                    z2 += ref[i]*ref[i];
                    half[i] = ((1 << (s.segs[group.seg0 + i/8] >> 24)) - 1)*0.5;
                    y[i] = ref[i]/s.step[group.step0 + i];
                    w[i] = (double) s.step[group.step0 + i]*s.step[group.step0 + i];
                    top = std::max(top, std::fabs(y[i])/(half[i] + 0.5));
                }
                worst = std::max(worst, group.rank ? std::sqrt(e2/z2) : 0);
                auto level = [&](int i, double scale) { return std::nearbyint(std::min(std::max(y[i]/scale + half[i], 0.0), 2*half[i])) - half[i]; };
                auto error = [&](double scale) {
                    double e = 0;
                    for (int i = 0; i < group.rank; i++) {
                        const double d = y[i] - level(i, scale)*scale;
                        e += d*d*w[i];
                    }
                    return e;
                };
                auto as_f16 = [](double v) { return (double) __half2float(__float2half((float) v)); };
                double best = 0, least = INFINITY;
                int worse = 0;
                for (float scale = std::min((float) top, 65504.0f); worse < 3; scale /= 1.19f) {
                    const double h = as_f16(scale);
                    if (h == 0) {
                        break;
                    }
                    const double e = error(h);
                    if (e < least) {
                        best = h;
                        least = e;
                        worse = 0;
                    } else {
                        worse++;
                    }
                }
                double ratio = std::sqrt(1.19);
                for (int r = 0; r < 2; r++, ratio = std::sqrt(ratio)) {
                    const double middle = best;
                    for (const double h : { as_f16(middle*ratio), as_f16(middle/ratio) }) {
                        if (h > 0 && std::isfinite(h) && error(h) < least) {
                            best = h;
                            least = error(h);
                        }
                    }
                }
                if (best > 0) {
                    double above = 0, below = 0;
                    for (int i = 0; i < group.rank; i++) {
                        above += w[i]*level(i, best)*y[i];
                        below += w[i]*level(i, best)*level(i, best);
                    }
                    const double refit = as_f16(above/below);
                    if (refit > 0 && std::isfinite(refit) && error(refit) < least) {
                        best = refit;
                    }
                }
                n_scale += best != scale_at(group, row);
                for (int i = 0; i < group.rank; i++) {
                    const int want = best > 0 ? (int)(level(i, best) + half[i]) : 0;
                    n_diff += want != code_at(s, group, row, i);
                    ok &= std::abs(want - code_at(s, group, row, i)) <= 1 || best != scale_at(group, row);
                    n_code++;
                }
            }
            for (int i = s.groups.back().row_end; i < s.dev.row_bytes; i++) {
                ok &= row[i] == 0;
            }
        }
        for (int i = c.n_token; i < n_row; i++) {
            for (int j = 0; j < s.dev.row_bytes; j++) {
                ok &= rows[idxs[i]*s.dev.row_bytes + j] == 0xff; // not named, not touched
            }
        }
        ok &= n_diff < 1 + n_code/2000 && n_scale <= 1 + c.n_token*s.dev.n_group/50 && worst < 1e-6;
        printf("  %s, %s: %.1e, %zu of %zu codes, %d scales differ%s", l[0].kernel ? l[0].kernel + 5 : "", l[1].kernel + 5, worst, n_diff, n_code, n_scale, ok ? "" : " WRONG");
        n_wrong += !ok;
    }
    printf("\n");
    fflush(stdout);
    free_all();
}

// Mean time of a store in a graph of 40, each with an encoder of its own: those of a model do not stay in the cache either.
static void bench_store(const StoreCase & c) {
    if (left_out(c.name)) {
        return;
    }
    Side s = make_side(c.n_head, c.hd, c.group_size, c.ranks, c.b0, c.b1, nullptr, true, 4);
    const int n_rep = 40;
    std::vector<float> x((size_t) c.n_token*c.n_head*c.hd);
    for (float & f : x) {
        f = gauss();
    }
    std::vector<int64_t> idxs(c.n_token);
    for (int i = 0; i < c.n_token; i++) {
        idxs[i] = i;
    }
    palu_cuda_store all = {};
    palu_cuda_stored & p = all.of[0];
    p.side = s.dev;
    p.x = upload(x);
    p.x_nb_head = c.hd*4;
    p.x_nb_token = (int64_t) c.n_head*c.hd*4;
    p.idxs = upload(idxs);
    all.n_side = 1;
    all.n_token = c.n_token;
    p.rows = (uint8_t *) room((size_t) c.n_token*s.dev.row_bytes);
    palu_cuda_launch l[2];
    palu_cuda_plan_store(&device, &all, l);
    p.latent = (float *) room((size_t) c.n_token*s.dev.rank_sum*4);
    std::vector<uint16_t *> enc;
    for (int i = 0; i < n_rep; i++) {
        enc.push_back(upload(s.enc));
    }
    launch(l[0], all); // sets the attributes
    launch(l[1], all);
    CHECK(cudaDeviceSynchronize());
    float us[3];
    for (int what = 0; what < 3; what++) { // both, project, quantize
        us[what] = time_graph_us(10, [&](cudaStream_t stream) {
            for (int i = 0; i < n_rep; i++) {
                p.side.enc = enc[i];
                for (int j = 0; j < 2; j++) {
                    if (what == 0 || what == j + 1) {
                        launch(l[j], all, stream);
                    }
                }
            }
        })/n_rep;
    }
    double flop = 0, bytes = x.size()*4.0 + (double) c.n_token*s.dev.row_bytes + s.enc.size()*2.0;
    for (const auto & g : s.groups) {
        flop += 2.0*g.rank*c.group_size*c.hd*c.n_token;
    }
    printf("%-44s %5d tokens  %6.1f us (%s %5.1f, %s %5.1f; floors: %5.1f us at 4.3 TB/s, %5.1f us at 495 TFLOP/s in two parts)\n", c.name, c.n_token,
        us[0], l[0].kernel + 5, us[1], l[1].kernel + 5, us[2], bytes/4.3e6, 2*flop/495e6);
    fflush(stdout);
    free_all();
}

static void check_all_store() {
    check_store({ "store 32x128, groups of 4, rank 128, 1 token",      32, 128, 4, {128}, 4, 2, 1 });
    check_store({ "store 8x128 joint, rank 480, 4 tokens",             8, 128, 8, {480}, 7, 1, 4 });
    check_store({ "store 3x96, ranks 0 to 64, all bits, 3 tokens",     3, 96, 1, {64, 0, 8}, 0, 0, 3, 1 });
    check_store({ "store 8x128 joint, rank 600, 19 tokens",            8, 128, 8, {600}, 6, 3, 19 });
    check_store({ "store 8x128 joint, rank 448, 600 tokens, strides",  8, 128, 8, {448}, 6, 3, 600, 4 });
    check_store({ "store 3x96, ranks 0 to 64, all bits, 9 tokens",     3, 96, 1, {64, 0, 8}, 0, 0, 9 });
    check_store({ "store 3x96, ranks 0 to 64, all bits, 34 tokens",    3, 96, 1, {64, 0, 8}, 0, 0, 34, 0, 1 });
    check_store({ "store 4x80, odd strides, 70 tokens",                4, 80, 1, {56, 80}, 0, 0, 70, 1 });
    check_store({ "store 2x90, groups of 2, 20 tokens",                2, 90, 2, {40}, 0, 0, 20 });
    check_store({ "store 32x128 joint, rank 2048, 17 tokens",          32, 128, 32, {2048}, 4, 1, 17 });
}

static void bench_all_store() {
    for (int n : { 1, 2, 4, 8, 16, 32, 512, 2048 }) {
        bench_store({ "store keys 8x128 joint, 448",          8, 128, 8, {448}, 6, 3, n });
        bench_store({ "store values 8x128 joint, 600",        8, 128, 8, {600}, 6, 3, n });
    }
    for (int n : { 1, 512 }) {
        bench_store({ "store keys 32x128, groups of 4, 128",     32, 128, 4, {128}, 4, 2, n });
        bench_store({ "store values 32x128, groups of 4, 384",   32, 128, 4, {384}, 4, 2, n });
    }
}

//
// Rebuild
//

// Devices that the plans are made for: this one, then as if it had the shared memory of smaller ones, and few multiprocessors.
static std::vector<palu_cuda_device> planned_devices() {
    std::vector<palu_cuda_device> all = { device, device };
    all[1].arch = 89;
    for (int smem : { 166912, 101376, 65536 }) {
        palu_cuda_device d = device;
        d.smem_optin = smem;
        d.n_sm = smem == 101376 ? 1 : d.n_sm;
        all.push_back(d);
        d.arch = 89;
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
    p.n_out = c.n_kv;

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
        printf("  %s/%d/%d/%d %.1e%s", strstr(l.kernel, "build_") + 6, p.slab, p.stages, p.n_split, error, ok ? "" : " WRONG");
        if (n_off) {
            printf(" %zu off", n_off);
        }
        n_wrong += !ok;
    }
    printf("\n");
    fflush(stdout);
    free_all();
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
    p.n_out = c.n_kv;
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
            for (int arch : { 90, 89 }) {
                palu_cuda_device dev = device;
                dev.arch = arch;
                if (every && smem <= (size_t) device.smem_optin) {
                    rebuild_launch(&dev, &p, cells, smem <= (size_t)(device.smem_optin + 1024)/2 - 1024 ? 2 : 1, &l);
                    report("  ");
                }
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

//
// Decode attention
//

static void check_decode_mma(const Case & c) {
    if (left_out(c.name)) {
        return;
    }
    Problem x = make_problem(c);
    const std::vector<double> ref = reference(c, x);
    printf("mma: %-53s", c.name);
    // as on devices with much and with little shared memory, each with many and few multiprocessors
    for (int smem : { device.smem_optin, 166912, 101376, 65536 }) {
        for (int n_sm : { device.n_sm, 1 }) {
            palu_cuda_device dev = { 89, n_sm, smem };
            palu_cuda_attn p = x.p;
            palu_cuda_launch l[4];
            palu_cuda_part rest;
            const bool none = palu_cuda_plan_attn(&dev, &p, &rest, l);
            const Plan way = { l[0], l[1], l[2], l[3], rest };
            if (none || !strcmp(way.decode.kernel, "palu_decode")) {
                printf("  (does not fit %d)", smem);
                break;
            }
            const double error = distance(run_attn(p, way, ref.size()), ref);
            const bool ok = error < 3e-3;
            printf("  %s %d/%d/%d %.1e%s", way.decode.kernel + strlen("palu_decode_mma_"), p.part.heads_per_cta, p.n_chunk, p.mma_slice, error, ok ? "" : " WRONG");
            n_wrong += !ok;
        }
    }
    printf("\n");
    fflush(stdout);
    free_all();
}

// Attention and combine, with the kernels of this device, with decode_mma, and (less than 20K cells) with those for any shape.
static void bench_decode_mma(Case c) {
    if (left_out(c.name) || (only_size && only_size != c.n_kv)) {
        return;
    }
    Problem x = make_problem(c, false);
    palu_cuda_attn p = x.p;
    p.rows_k = upload_again(random_rows(x.k, 4096), c.n_kv, p.k.row_bytes);
    p.rows_v = upload_again(random_rows(x.v, 4096), c.n_kv, p.v.row_bytes);
    p.out = (float *) room((size_t) c.n_token*c.n_head*c.hd_v*4);
    printf("%-40s %7d cells %2d tokens", c.name, c.n_kv, c.n_token);
    std::vector<std::vector<float>> out;
    for (int arch : { 90, 89, 0 }) {
        palu_cuda_device dev = device;
        dev.arch = arch;
        const Plan way = plan(dev, p);
        if ((arch == 90 && strstr(way.decode.kernel, "_mma_")) || (arch == 0 && c.n_kv > 20000)) {
            continue;
        }
        p.partial = (float *) room(palu_cuda_partial_size(&p)*4);
        const float us = time_us(arch ? 20 : 2, [&](int) {
            launch_decode(way, p);
            launch(way.combine, p);
        });
        printf("  %s %d/%d %8.1f us", way.decode.kernel + strlen("palu_decode"), p.part.heads_per_cta, p.n_chunk, us);
        fflush(stdout);
        out.emplace_back((size_t) c.n_token*c.n_head*c.hd_v);
        CHECK(cudaMemcpy(out.back().data(), p.out, out.back().size()*4, cudaMemcpyDeviceToHost));
    }
    if (out.size() > 1) {
        const double diff = distance(out[0], std::vector<double>(out.back().begin(), out.back().end()));
        printf("  differ by %.1e%s", diff, diff < 5e-3 ? "" : " WRONG");
        n_wrong += !(diff < 5e-3);
    }
    printf("\n");
    fflush(stdout);
    free_all();
}

static void check_all_decode_mma(const std::vector<Case> & cases) {
    for (const Case & c : cases) {
        check_decode_mma(c);
    }
    //                                                          heads    dims      groups  ranks                bits         tok str kv    rope            mask  sinks  cap  alibi pos align
    check_decode_mma({ "GQA 32/8x128 joint, 8 tokens",          32, 8, 128, 128,  8, 8, {448}, {600}, 6, 3, 6, 3,  8, 1,  400, 128, 0, false, 1, true, 0, 0, 1, 4 });
    check_decode_mma({ "GQA 16/2x128, 5 tokens, random",        16, 2, 128, 128,  2, 2, {200}, {296}, 0, 0, 0, 0,  5, 2,  190, 128, 0, true, 2, false, 0, 8, 2, 4 });
    check_decode_mma({ "MHA 8x64 joint, 17 tokens, two planes", 8, 8, 64, 64,  8, 8, {160}, {720}, 8, 3, 8, 3,  17, 1,  130, 64, 0, false, 1, false, 30, 0, 1, 4, 2 });
    check_decode_mma({ "MHA 16x128 joint, rank 1400",           16, 16, 128, 128,  16, 16, {640}, {1400}, 3, 1, 3, 1,  1, 1,  300, 128, 0, false, 0, false, 0, 0, 1, 4 });
    check_decode_mma({ "GQA 4/2x256, 3 tokens, two planes",     4, 2, 256, 256,  2, 2, {64}, {96}, 8, 2, 8, 2,  3, 1,  100, 256, 0, true, 1, true, 0, 0, 0, 4, 2 });
    check_decode_mma({ "GQA 12/2x72, partial RoPE, 2 tokens",   12, 2, 72, 72,  1, 2, {56, 24}, {88}, 0, 0, 0, 0,  2, 1,  257, 20, 3, false, 1, false, 0, 0, 1, 4 });
}

static void bench_all_decode_mma(const std::vector<Case> & cases) {
    for (int n_kv : { 16384, 65536 }) {
        for (int n_token : { 1, 2, 4, 8, 16 }) {
            Case c = first_case(cases, 8);
            c.name = "decode GQA joint (448, 600)";
            c.n_kv = n_kv;
            c.n_token = n_token;
            bench_decode_mma(c);
            c = first_case(cases, 32);
            c.name = "decode MHA (1024, 3072)";
            c.n_kv = n_kv;
            c.n_token = n_token;
            bench_decode_mma(c);
        }
    }
}
