//! Properties of the routing game: the potential never falls, play ends, nobody regrets, limits hold; prices balance; and why
//! play is one token at a time, over neighbours that see each other.

use nash_games::GameError;
use nash_games::routing::{
    Balance, Neighbours, PriceCache, PriceRouter, RoutingGame, Rules, ScoreStatistics, Scores, certify_game,
    certify_prices,
};
use nash_kernels::pool;
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

/// A small random game, by value.
#[derive(Debug)]
struct Small {
    scores: Vec<f32>,
    experts: usize,
    top_k: usize,
    rules: Rules,
    rewards: Vec<f32>,
    neighbours: Neighbours,
}

impl Small {
    fn random(seed: u64) -> Self {
        let mut rng = Pcg64Mcg::seed_from_u64(seed);
        let (tokens, experts) = (rng.random_range(1usize..13), rng.random_range(2usize..8));
        let top_k = rng.random_range(1..=experts.min(3));
        // Every second game has only a few different scores: ties are where play could go on for ever.
        let coarse = rng.random::<bool>();
        let mut value = || {
            let v = rng.random_range(-2.0f32..2.0);
            if coarse { v.round() } else { v }
        };
        let scores = (0..tokens * experts).map(|_| value()).collect();
        let rewards = (0..experts).map(|_| value()).collect();
        let states: Vec<f32> = (0..3 * tokens).map(|_| value()).collect();
        let least = (tokens * top_k).div_ceil(experts);
        let rules = Rules {
            congestion: rng.random_range(0.0..3.0),
            company: f64::from(rng.random_range(0..4u8)) * 0.3,
            capacity: rng.random::<bool>().then(|| least + rng.random_range(0..3usize)),
        };
        Self {
            scores,
            experts,
            top_k,
            rules,
            rewards,
            neighbours: Neighbours::nearest(&states, tokens, 3, 7).expect("a graph"),
        }
    }

    fn game(&self) -> RoutingGame<'_> {
        let scores = Scores::new(&self.scores, self.experts).expect("whole rows");
        let game = RoutingGame::new(scores, self.top_k, self.rules).expect("room for all");
        let game = game.with_rewards(&self.rewards).expect("one per expert");
        game.with_neighbours(&self.neighbours).expect("one per token")
    }

    /// u of one token, from its definition.
    fn payoff(&self, choices: &[u16], token: usize) -> f64 {
        let set = |t: usize| &choices[t * self.top_k..][..self.top_k];
        let mean = choices.len() as f64 / self.experts as f64;
        let mut payoff = 0.0;
        for &e in set(token) {
            let load = choices.iter().filter(|&&other| other == e).count() as f64;
            payoff += f64::from(self.scores[token * self.experts + usize::from(e)]);
            payoff += f64::from(self.rewards[usize::from(e)]) - self.rules.congestion * load / mean;
        }
        for &j in self.neighbours.of(token) {
            payoff +=
                self.rules.company * set(token).iter().filter(|e| set(j as usize).contains(e)).count() as f64;
        }
        payoff
    }

    /// The most that `token` can gain by any other set that has room.
    fn regret(&self, choices: &[u16], token: usize) -> f64 {
        let stay = self.payoff(choices, token);
        let mut best: f64 = 0.0;
        for set in subsets(self.experts, self.top_k) {
            let mut changed = choices.to_vec();
            changed[token * self.top_k..][..self.top_k].copy_from_slice(&set);
            let full = |e: &u16| {
                changed.iter().filter(|o| *o == e).count() > self.rules.capacity.unwrap_or(usize::MAX)
            };
            if !set.iter().any(full) {
                best = best.max(self.payoff(&changed, token) - stay);
            }
        }
        best
    }
}

/// All sets of `k` of `n`.
fn subsets(n: usize, k: usize) -> Vec<Vec<u16>> {
    let members = |mask: u32| (0..n as u16).filter(move |e| mask >> e & 1 == 1);
    let right_size = (0u32..1 << n).filter(|mask| mask.count_ones() as usize == k);
    right_size.map(|mask| members(mask).collect()).collect()
}

#[test]
fn ten_thousand_games_all_end() {
    let mut unconverged = 0;
    for seed in 0..10_000 {
        let small = Small::random(seed);
        let mut choices = small.game().start();
        let played = small.game().play(&mut choices, 1000).unwrap();
        let certificate = certify_game(&small.game(), &choices).unwrap();
        unconverged += u32::from(!played.settled || certificate.unsettled > 0);
    }
    assert_eq!(unconverged, 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn the_potential_is_exact_and_play_ends_without_regret(seed in any::<u64>()) {
        let small = Small::random(seed);
        let game = small.game();
        let mut choices = game.start();
        // Payoffs are below 3·(2 + 2 + 3·7 + 11·0.9): sums of some hundred of them in f64 are good to this.
        const EXACT: f64 = 1e-10;

        // Exact: what a move changes in the payoff of its player it changes in Φ.
        let before = game.potential(&choices).unwrap();
        for token in 0..choices.len() / small.top_k {
            for set in subsets(small.experts, small.top_k) {
                let mut changed = choices.clone();
                changed[token * small.top_k..][..small.top_k].copy_from_slice(&set);
                if let Ok(after) = game.potential(&changed) {
                    let gain = small.payoff(&changed, token) - small.payoff(&choices, token);
                    prop_assert!((after - before - gain).abs() < EXACT, "Φ by {}, u by {gain}", after - before);
                }
            }
        }

        let played = game.play(&mut choices, 1000).unwrap();
        prop_assert!(played.settled);
        prop_assert!(played.potential.windows(2).all(|p| p[1] >= p[0] - EXACT), "{played:?}");
        prop_assert!((played.potential.last().unwrap() - game.potential(&choices).unwrap()).abs() < EXACT);
        let certificate = certify_game(&game, &choices).unwrap();
        prop_assert_eq!(certificate.unsettled, 0);
        for token in 0..choices.len() / small.top_k {
            prop_assert!(small.regret(&choices, token) < EXACT, "token {token} regrets");
        }
    }

    #[test]
    fn the_certificate_finds_the_regret_of_any_profile(seed in any::<u64>(), other in any::<u64>()) {
        let small = Small::random(seed);
        let mut rng = Pcg64Mcg::seed_from_u64(other);
        let sets = subsets(small.experts, small.top_k);
        let tokens = small.scores.len() / small.experts;
        let choices: Vec<u16> = (0..tokens).flat_map(|_| sets[rng.random_range(0..sets.len())].clone()).collect();
        match certify_game(&small.game(), &choices) {
            Ok(found) => {
                let true_regret = (0..tokens).map(|t| small.regret(&choices, t)).fold(0.0, f64::max);
                prop_assert!((found.max_regret - true_regret).abs() < 1e-10, "{found:?} {true_regret}");
            }
            // Full experts.
            Err(error) => prop_assert!(small.rules.capacity.is_some(), "{error}"),
        }
    }

    #[test]
    fn starts_leave_room_for_everybody(tokens in 1usize..40, experts in 1usize..12, k in 1usize..8, more in 0usize..3, seed in any::<u64>()) {
        let k = k.min(experts);
        let mut rng = Pcg64Mcg::seed_from_u64(seed);
        // The same favourites for most: greedy tokens would leave the last ones without k experts.
        let scores: Vec<f32> = (0..tokens * experts).map(|i| (i % experts) as f32 + rng.random_range(0.0..1.5)).collect();
        let scores = Scores::new(&scores, experts).unwrap();
        let capacity = (tokens * k).div_ceil(experts) + more;
        let rules = Rules { capacity: Some(capacity), congestion: 0.5, company: 0.0 };
        let game = RoutingGame::new(scores, k, rules).unwrap();
        let mut choices = game.start();
        prop_assert!(game.loads(&choices).is_ok());
        prop_assert!(game.play(&mut choices, 1000).unwrap().settled);
        prop_assert!(game.loads(&choices).is_ok());
        if (tokens * k) > experts * (capacity - 1) {
            let less = Rules { capacity: Some(capacity - 1), ..rules };
            prop_assert!(matches!(RoutingGame::new(scores, k, less), Err(GameError::Capacity { .. })), "no room for all");
        }
    }
}

/// Two tokens, two experts, k = 1, no scores: who shares an expert pays twice. Both at expert 0 answer at once, and at once again.
#[test]
fn simultaneous_play_cycles() {
    let scores = [0.0f32; 4];
    let rules = Rules {
        congestion: 1.0,
        ..Rules::default()
    };
    let game = RoutingGame::new(Scores::new(&scores, 2).unwrap(), 1, rules).unwrap();
    // The answer of each token to the others' old choices: where it is alone, another load of 1 is cheaper than its 2.
    let answer_at_once = |choices: &[u16]| -> Vec<u16> {
        (0..2)
            .map(|token| {
                let gain = |e: u16| {
                    let mut changed = choices.to_vec();
                    changed[token] = e;
                    game.potential(&changed).unwrap()
                };
                if gain(1) > gain(0) { 1 } else { 0 }
            })
            .collect()
    };
    let first = vec![0, 0];
    let second = answer_at_once(&first);
    assert_eq!(second, [1, 1]);
    assert_eq!(answer_at_once(&second), first);
    // One after the other they part, and stay.
    let mut choices = first;
    let played = game.play(&mut choices, 10).unwrap();
    assert_eq!((played.sweeps, played.moves, choices), (2, 1, vec![1, 0]));
}

/// A seeks the company of B, who does not see A and only flees the crowd: matching pennies, without a pure equilibrium in any order of play.
/// The same game with neighbours that see each other has one.
#[test]
fn one_sided_neighbours_cycle() {
    let (crowd, company) = (1.0, 2.0);
    // Two tokens at one expert: each pays for a load of 2, mean load 1.
    let payoff = |a: u16, b: u16, sees: bool| {
        let together = f64::from(u8::from(a == b));
        -crowd * (1.0 + together) + if sees { company * together } else { 0.0 }
    };
    for sees_back in [false, true] {
        let stable = |a: u16, b: u16| {
            payoff(a, b, true) >= payoff(1 - a, b, true)
                && payoff(b, a, sees_back) >= payoff(1 - b, a, sees_back)
        };
        let equilibria = [(0, 0), (0, 1), (1, 0), (1, 1)]
            .iter()
            .filter(|&&(a, b)| stable(a, b))
            .count();
        assert_eq!(equilibria, if sees_back { 2 } else { 0 });
    }
    // One after the other from (0, 0): B flees, A follows, B flees back, A follows.
    let (mut a, mut b) = (0, 0);
    let mut seen = Vec::new();
    for _ in 0..2 {
        for player in [1, 0] {
            let (own, other, sees) = if player == 0 {
                (&mut a, b, true)
            } else {
                (&mut b, a, false)
            };
            if payoff(1 - *own, other, sees) > payoff(*own, other, sees) {
                *own = 1 - *own;
            }
            seen.push((a, b));
        }
    }
    assert_eq!(seen, [(0, 1), (1, 1), (1, 0), (0, 0)]);
    // So such neighbours are refused, and symmetric ones settle.
    let directed = Neighbours::from_lists(&[vec![1], vec![]]);
    assert_eq!(directed, Err(GameError::Directed { from: 0, to: 1 }));
    let scores = [0.0f32; 4];
    let neighbours = Neighbours::from_lists(&[vec![1], vec![0]]).unwrap();
    let rules = Rules {
        congestion: crowd,
        company,
        capacity: None,
    };
    let game = RoutingGame::new(Scores::new(&scores, 2).unwrap(), 1, rules).unwrap();
    let game = game.with_neighbours(&neighbours).unwrap();
    let mut choices = vec![0, 1];
    assert!(game.play(&mut choices, 10).unwrap().settled);
    assert_eq!(choices[0], choices[1]);
}

#[test]
fn what_is_no_game_is_refused() {
    assert!(matches!(Scores::new(&[0.0; 5], 2), Err(GameError::Length { .. })));
    assert!(matches!(
        Scores::new(&[0.0, f32::NAN], 2),
        Err(GameError::NotFinite {
            what: "scores",
            index: 1
        })
    ));
    let values = [0.0f32; 6];
    let scores = Scores::new(&values, 3).unwrap();
    for top_k in [0, 4, 9] {
        let expected = GameError::TopK { top_k, experts: 3 };
        assert_eq!(
            RoutingGame::new(scores, top_k, Rules::default()).unwrap_err(),
            expected
        );
        assert_eq!(PriceRouter::new(3, top_k).unwrap_err(), expected);
    }
    let game = RoutingGame::new(scores, 2, Rules::default()).unwrap();
    for (choices, token, expert) in [([0, 0, 1, 2], 0, 0), ([0, 1, 1, 3], 1, 3)] {
        let expected = Err(GameError::Choice { token, expert });
        assert_eq!(game.potential(&choices), expected);
        assert_eq!(certify_game(&game, &choices).map(|_| 0.0), expected);
    }
    let mut router = PriceRouter::new(3, 2).unwrap();
    let mut choices = [0; 4];
    assert!(matches!(
        router.select(scores, &[0.0; 2], &mut choices),
        Err(GameError::Length { .. })
    ));
    assert!(matches!(
        router.select(scores, &[0.0, 0.0, f32::INFINITY], &mut choices),
        Err(GameError::NotFinite { .. })
    ));
    assert!(matches!(
        router.select(scores, &[0.0; 3], &mut choices[..3]),
        Err(GameError::Length { .. })
    ));
}

/// Scores of tokens from a mixture: a bias per expert, preferences in 8 directions, and noise. The source is `seed`, the batch `batch`.
fn skewed(tokens: usize, experts: usize, seed: u64, batch: u64) -> Vec<f32> {
    const RANK: usize = 8;
    fn normal(rng: &mut Pcg64Mcg) -> f32 {
        (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0
    }
    let mut rng = Pcg64Mcg::seed_from_u64(seed);
    let bias: Vec<f32> = (0..experts).map(|_| normal(&mut rng)).collect();
    let directions: Vec<f32> = (0..experts * RANK)
        .map(|_| normal(&mut rng) / (RANK as f32).sqrt())
        .collect();
    let mut rng = Pcg64Mcg::seed_from_u64(seed ^ (batch + 1) << 32);
    let mut scores = Vec::with_capacity(tokens * experts);
    for _ in 0..tokens {
        let token: Vec<f32> = (0..RANK).map(|_| normal(&mut rng)).collect();
        for (bias, direction) in bias.iter().zip(directions.chunks(RANK)) {
            let liking: f32 = direction.iter().zip(&token).map(|(d, t)| d * t).sum();
            scores.push(bias + liking + 0.5 * normal(&mut rng));
        }
    }
    scores
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn selection_is_that_of_a_sort(
        tokens in 0usize..700, experts in 1usize..80, k in 1usize..9, coarse in any::<bool>(), seed in any::<u64>()
    ) {
        let k = k.min(experts);
        let mut rng = Pcg64Mcg::seed_from_u64(seed);
        let mut value = || {
            let v = rng.random_range(-4.0f32..4.0);
            // No −0: it equals 0 but sorts before it.
            if coarse { v.round() + 0.0 } else { v }
        };
        let values: Vec<f32> = (0..tokens * experts).map(|_| value()).collect();
        let prices: Vec<f32> = (0..experts).map(|_| value()).collect();
        let scores = Scores::new(&values, experts).unwrap();
        let mut router = PriceRouter::new(experts, k).unwrap();
        let mut choices = vec![0; tokens * k];
        router.select(scores, &prices, &mut choices).unwrap();
        let mut loads = vec![0; experts];
        for (token, found) in choices.chunks(k).enumerate() {
            let worth = |&e: &u16| scores.row(token)[usize::from(e)] - prices[usize::from(e)];
            let mut order: Vec<u16> = (0..experts as u16).collect();
            order.sort_by(|a, b| worth(b).total_cmp(&worth(a)).then(a.cmp(b)));
            prop_assert_eq!(found, &order[..k]);
            found.iter().for_each(|&e| loads[usize::from(e)] += 1);
        }
        prop_assert_eq!(router.loads(), loads);
        prop_assert_eq!(certify_prices(scores, &prices, &choices).unwrap().max_regret, 0.0);
        // A smaller batch after a larger one sees nothing of it.
        if tokens > 0 {
            let few = Scores::new(scores.row(0), experts).unwrap();
            let mut first = vec![0; k];
            router.select(few, &prices, &mut first).unwrap();
            prop_assert_eq!(&first, &choices[..k]);
            prop_assert_eq!(router.loads().iter().sum::<u32>() as usize, k);
        }
    }

    #[test]
    fn balancing_never_ends_worse_and_tells_the_truth(
        tokens in 0usize..400, experts in 1usize..40, k in 1usize..9, steps in 0usize..12, seed in any::<u64>()
    ) {
        let k = k.min(experts);
        let values = skewed(tokens, experts, seed, 0);
        let scores = Scores::new(&values, experts).unwrap();
        let mut router = PriceRouter::new(experts, k).unwrap();
        let (mut prices, mut choices) = (vec![0.0; experts], vec![0; tokens * k]);
        router.select(scores, &prices, &mut choices).unwrap();
        let before = certify_prices(scores, &prices, &choices).unwrap();
        let options = Balance { max_steps: steps, tolerance: 0.05 };
        let found = router.balance(scores, &mut prices, &mut choices, options).unwrap();
        let after = certify_prices(scores, &prices, &choices).unwrap();
        prop_assert!((after.max_violation - found.max_violation).abs() < 1e-12 && found.steps <= steps);
        prop_assert!(after.max_violation <= before.max_violation && after.max_regret == 0.0);
        if tokens > 0 && steps > 0 && k < experts && found.steps > 0 {
            prop_assert_eq!(prices.iter().copied().fold(f32::INFINITY, f32::min), 0.0);
        }
        if found.settled && tokens > 0 {
            let mean = (tokens * k) as f64 / experts as f64;
            prop_assert!(found.max_violation <= 0.05f64.max(mean.ceil() / mean - 1.0));
        }
    }
}

proptest! {
    /// Weak duality: no balanced assignment, of all that there are, beats the choices by more than the certificate's slackness.
    #[test]
    fn slackness_bounds_every_balanced_assignment(seed in any::<u64>(), steps in 0usize..4) {
        let (tokens, experts) = (6u32, 3u16);
        let values = skewed(tokens as usize, usize::from(experts), seed, 0);
        let scores = Scores::new(&values, usize::from(experts)).unwrap();
        let total = |choices: &[u16]| -> f64 {
            choices.iter().enumerate().map(|(t, &e)| f64::from(scores.row(t)[usize::from(e)])).sum()
        };
        let assignment = |number: u32| -> Vec<u16> { (0..tokens).map(|t| (number / 3u32.pow(t) % 3) as u16).collect() };
        let balanced = |choices: &[u16]| (0..experts).all(|e| choices.iter().filter(|&&c| c == e).count() == 2);
        let best = (0..3u32.pow(tokens)).map(assignment).filter(|c| balanced(c)).map(|c| total(&c)).fold(f64::MIN, f64::max);

        let mut router = PriceRouter::new(usize::from(experts), 1).unwrap();
        let (mut prices, mut choices) = (vec![0.0; usize::from(experts)], vec![0; tokens as usize]);
        let options = Balance { max_steps: steps, tolerance: 0.0 };
        router.balance(scores, &mut prices, &mut choices, options).unwrap();
        let certificate = certify_prices(scores, &prices, &choices).unwrap();
        let bound = total(&choices) + certificate.slackness * f64::from(tokens);
        // Choices are made by differences in f32 of values below 10: each of 6 can be wrong by that rounding.
        prop_assert!(bound >= best - 6.0 * 10.0 * f64::from(f32::EPSILON), "{bound} < {best}");
    }
}

/// The bar: MaxVio ≤ 0.12 after one step on 2048 tokens and 64 experts, from a guess as well as from the prices of another batch.
#[test]
fn one_step_balances_a_batch() {
    let (tokens, experts, k) = (2048, 64, 8);
    let one = Balance {
        max_steps: 1,
        tolerance: 0.0,
    };
    let mut router = PriceRouter::new(experts, k).unwrap();
    let mut statistics = ScoreStatistics::default();
    let mut choices = vec![0; tokens * k];
    for seed in 0..5 {
        let first = skewed(tokens, experts, seed, 0);
        let first = Scores::new(&first, experts).unwrap();
        let mut prices = vec![0.0; experts];
        router.select(first, &prices, &mut choices).unwrap();
        let free = certify_prices(first, &prices, &choices).unwrap();
        assert!(free.max_violation > 2.0, "not skewed: {free:?}");
        statistics.measure(first);
        statistics.guess_prices(k, &mut prices);
        let cold = router.balance(first, &mut prices, &mut choices, one).unwrap();
        assert!(cold.max_violation <= 0.12, "{cold:?}");
        let cache = PriceCache::new(1, 0.25);
        cache.store(0, &statistics, &prices);

        let second = skewed(tokens, experts, seed, 1);
        let second = Scores::new(&second, experts).unwrap();
        statistics.measure(second);
        assert!(
            cache.look_up(0, &statistics, &mut prices),
            "the same source has not drifted"
        );
        let warm = router.balance(second, &mut prices, &mut choices, one).unwrap();
        assert!(warm.max_violation <= 0.12, "{warm:?}");
        // Another source has.
        let other = skewed(tokens, experts, seed + 100, 0);
        statistics.measure(Scores::new(&other, experts).unwrap());
        assert!(!cache.look_up(0, &statistics, &mut prices));
    }
}

/// A call from inside a job of the pool runs on one thread.
#[test]
fn results_do_not_depend_on_the_threads() {
    let (tokens, experts, k) = (1500, 48, 6);
    let values = skewed(tokens, experts, 3, 0);
    let scores = Scores::new(&values, experts).unwrap();
    let solve = || {
        let mut router = PriceRouter::new(experts, k).unwrap();
        let (mut prices, mut choices) = (vec![0.0; experts], vec![0; tokens * k]);
        let options = Balance {
            max_steps: 5,
            tolerance: 0.0,
        };
        router
            .balance(scores, &mut prices, &mut choices, options)
            .unwrap();
        (prices, choices)
    };
    let many = solve();
    let single = std::sync::Mutex::new(Vec::new());
    pool::run(2, |_| single.lock().unwrap().push(solve()));
    assert_eq!(single.into_inner().unwrap(), [many.clone(), many]);
}
