//! Chooses the endpoint for one attempt.
//!
//! Candidates are compared by what cannot be traded first: whether they are fit, whether this request has tried them
//! already, their tier, their nearness. Those that are best in all of it are the survivors. Between survivors of equal
//! weight the policy decides: of two drawn at random the lower score wins (Peak EWMA latency × requests in flight ×
//! the price weight of the path). Unequal weights are exact shares: a smooth weighted round robin per worker.
//!
//! An unhealthy endpoint is used when nothing else is left, because a health check may be wrong and an answer is
//! certain to be. An open circuit and a full endpoint are never used: they exist to send nothing.

use std::{sync::Arc, time::Duration};

use fastrand::Rng;
use smallvec::SmallVec;

use crate::{
    balance::{Pass, Tick, Vitals},
    model::{Circuit, Endpoint, EndpointState, Locality, NanoUsd, Place, Policy, Routing, Zone},
};

/// When endpoints take part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tier {
    /// Always.
    Active,
    /// When no active one is left.
    Standby,
    /// When nothing else is left: draining and deprecated endpoints.
    Leaving,
}

impl From<EndpointState> for Tier {
    fn from(state: EndpointState) -> Self {
        match state {
            EndpointState::Active => Self::Active,
            EndpointState::Standby => Self::Standby,
            EndpointState::Draining | EndpointState::Deprecated => Self::Leaving,
        }
    }
}

/// One endpoint as the choice sees it; made once per snapshot.
#[derive(Clone, Debug)]
pub struct Candidate {
    tier: Tier,
    weight: u32,
    rank: u8,
    price: Option<NanoUsd>,
    price_weight: f32,
    most_in_flight: u32,
    vitals: Arc<Vitals>,
}

impl Candidate {
    /// `price` is that of the path there, per GB; an unknown one counts as the highest. `most_in_flight` is
    /// `limits.requests`.
    #[must_use]
    pub fn new(
        endpoint: &Endpoint,
        rank: u8,
        price: Option<NanoUsd>,
        most_in_flight: Option<u32>,
        vitals: Arc<Vitals>,
    ) -> Self {
        Self {
            tier: endpoint.state.into(),
            weight: endpoint.weight,
            rank,
            price,
            price_weight: price_weight(price),
            most_in_flight: most_in_flight.unwrap_or(u32::MAX),
            vitals,
        }
    }

    /// How near `endpoint` is to a caller at `place` and `zone`, as far as `locality` cares; 0 is nearest. An unknown
    /// zone is another zone.
    #[must_use]
    pub fn rank(locality: Locality, place: &Place, zone: Option<&Zone>, endpoint: &Endpoint) -> u8 {
        let same_provider = endpoint.place.provider() == place.provider();
        let same_place = endpoint.place == *place;
        let same_zone = same_place && zone.is_some() && endpoint.zone.as_ref() == zone;
        match locality {
            Locality::None => 0,
            Locality::Provider => u8::from(!same_provider),
            Locality::Region => u8::from(!same_place) + u8::from(!same_provider),
            Locality::Zone => {
                u8::from(!same_zone) + u8::from(!same_place) + u8::from(!same_provider)
            }
        }
    }

    /// What the process knows about it.
    #[must_use]
    pub fn vitals(&self) -> &Arc<Vitals> {
        &self.vitals
    }

    /// What the choice thinks of it now.
    #[must_use]
    pub fn appraise(&self, aim: &Aim, now: Tick) -> Appraisal {
        Appraisal {
            standing: self.standing(aim, now),
            latency: Duration::from_secs_f32(self.vitals.latency.project(now)),
            in_flight: self.vitals.in_flight(),
            price: self.price,
            score: self.score(aim, now),
        }
    }

    fn standing(&self, aim: &Aim, now: Tick) -> Standing {
        if !self.vitals.breaker.permits(&aim.circuit, now) {
            Standing::Open
        } else if self.vitals.in_flight() >= self.most_in_flight {
            Standing::Full
        } else if self.vitals.healthy() {
            Standing::Fit
        } else {
            Standing::Unhealthy
        }
    }

    /// Seconds that one more request is expected to take, weighed by the path's price where the policy looks at it.
    fn score(&self, aim: &Aim, now: Tick) -> f32 {
        // Beyond 65,535 in flight the endpoint is as busy as it gets.
        let in_flight = u16::try_from(self.vitals.in_flight()).unwrap_or(u16::MAX);
        let score = self.vitals.latency.project(now) * (f32::from(in_flight) + 1.0);
        match (aim.policy, aim.latency_target) {
            (Policy::Balanced, None) => score * self.price_weight,
            (Policy::Latency | Policy::Cost | Policy::Balanced, _) => score,
        }
    }

    fn price_order(&self) -> i64 {
        self.price.map_or(i64::MAX, |price| price.0)
    }
}

/// `balanced` without a target: each cent per GB makes a path look as slow again. Unknown and absurd prices weigh most.
fn price_weight(price: Option<NanoUsd>) -> f32 {
    const NANOS_PER_HUNDREDTH_CENT: i64 = 100_000;
    let units = price.map_or(i64::MAX, |price| price.0.max(0) / NANOS_PER_HUNDREDTH_CENT);
    1.0 + f32::from(u16::try_from(units).unwrap_or(u16::MAX)) / 100.0
}

/// Whether a candidate may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    /// Yes.
    Fit,
    /// Its health checks fail: only when nothing fit is left.
    Unhealthy,
    /// It has all the requests it may have: no.
    Full,
    /// Its circuit is open: no.
    Open,
}

/// What the choice thinks of a candidate, for people to read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Appraisal {
    /// Whether it may be used.
    pub standing: Standing,
    /// What an answer is expected to take.
    pub latency: Duration,
    /// Requests on their way.
    pub in_flight: u32,
    /// Price of the path per GB.
    pub price: Option<NanoUsd>,
    /// The lower wins.
    pub score: f32,
}

/// What a good choice is; made once per snapshot.
#[derive(Clone, Debug)]
pub struct Aim {
    policy: Policy,
    latency_target: Option<f32>,
    circuit: Circuit,
}

impl Aim {
    /// The aim of a service.
    #[must_use]
    pub fn new(routing: &Routing, circuit: &Circuit) -> Self {
        Self {
            policy: routing.policy,
            latency_target: routing.latency_target.map(|target| target.as_secs_f32()),
            circuit: circuit.clone(),
        }
    }

    /// When endpoints are left alone; what [`crate::balance::Breaker::settle`] asks for.
    #[must_use]
    pub fn circuit(&self) -> &Circuit {
        &self.circuit
    }
}

/// The candidates that earlier attempts of one request went to.
#[derive(Clone, Debug, Default)]
pub struct Tried(SmallVec<[usize; 4]>);

impl Tried {
    /// An attempt went to the candidate at `index`.
    pub fn add(&mut self, index: usize) {
        self.0.push(index);
    }

    fn contains(&self, index: usize) -> bool {
        self.0.contains(&index)
    }
}

/// The candidate for one attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// Its index in the candidates.
    pub index: usize,
    /// Goes back into [`crate::balance::Breaker::settle`].
    pub pass: Pass,
    /// [`Standing::Fit`] or [`Standing::Unhealthy`].
    pub standing: Standing,
}

/// Why no candidate was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoChoice {
    /// There is no candidate.
    #[error("no endpoint is there to choose")]
    Empty,
    /// Every circuit is open; the first lets a probe pass at `retry_at` (`None`: an operator keeps it open).
    #[error("the circuit of every endpoint is open")]
    CircuitOpen {
        /// When the first may be tried again.
        retry_at: Option<Tick>,
    },
    /// Those whose circuit is not open have all the requests they may have.
    #[error("every endpoint has as many requests as it may have")]
    Full,
}

/// What candidates are compared by before the policy is asked; the lowest survive.
type Key = (Standing, bool, Tier, u8);

/// One worker's memory for the choices within one service.
///
/// It belongs to one list of candidates; a list of another length starts it anew.
#[derive(Debug, Default)]
pub struct Picker {
    /// Smooth weighted round robin: what each candidate is owed, in weights.
    credit: Vec<i64>,
    /// Kept between choices only for its memory.
    survivors: Vec<usize>,
}

impl Picker {
    /// Chooses one candidate and gets leave from its circuit. The caller settles the pass, whatever comes of the attempt.
    ///
    /// # Errors
    /// [`NoChoice`] when none may be used.
    pub fn choose(
        &mut self,
        candidates: &[Candidate],
        tried: &Tried,
        aim: &Aim,
        now: Tick,
        rng: &mut Rng,
    ) -> Result<Chosen, NoChoice> {
        // Another worker may take the one probe of a half-open circuit between look and leave; then we look again.
        for _ in 0..=candidates.len() {
            let Some((index, standing)) = self.draw(candidates, tried, aim, now, rng) else {
                break;
            };
            let admitted =
                candidates.get(index).and_then(|it| it.vitals.breaker.admit(&aim.circuit, now));
            if let Some(pass) = admitted {
                return Ok(Chosen { index, pass, standing });
            }
        }
        Err(refusal(candidates, aim, now))
    }

    fn draw(
        &mut self,
        candidates: &[Candidate],
        tried: &Tried,
        aim: &Aim,
        now: Tick,
        rng: &mut Rng,
    ) -> Option<(usize, Standing)> {
        let (standing, _, tier, _) = self.survive(candidates, tried, aim, now)?;
        if let [only] = *self.survivors {
            // What it is owed does not change: without a choice nobody was passed over.
            return Some((only, standing));
        }
        let index =
            if shared(candidates, tier) { self.by_share(candidates, tried, rng) } else { None };
        let index = index.or_else(|| self.by_policy(candidates, aim, now, rng))?;
        Some((index, standing))
    }

    /// Leaves those with the lowest key in `survivors` and returns that key.
    fn survive(
        &mut self,
        candidates: &[Candidate],
        tried: &Tried,
        aim: &Aim,
        now: Tick,
    ) -> Option<Key> {
        self.survivors.clear();
        let mut lowest: Option<Key> = None;
        for (index, it) in candidates.iter().enumerate() {
            let standing = it.standing(aim, now);
            if standing >= Standing::Full {
                continue;
            }
            let key = (standing, tried.contains(index), it.tier, it.rank);
            if lowest.is_none_or(|lowest| key < lowest) {
                lowest = Some(key);
                self.survivors.clear();
            }
            if lowest == Some(key) {
                self.survivors.push(index);
            }
        }
        lowest
    }

    /// The survivor whose turn it is. Retries are drawn by weight instead, so that they do not bend the shares.
    fn by_share(
        &mut self,
        candidates: &[Candidate],
        tried: &Tried,
        rng: &mut Rng,
    ) -> Option<usize> {
        let weight = |index: usize| candidates.get(index).map_or(0, |it| i64::from(it.weight));
        let total: i64 = self.survivors.iter().map(|index| weight(*index)).sum();
        if total == 0 {
            return None;
        }
        if !tried.0.is_empty() {
            let mut mark = rng.i64(0..total);
            return self.survivors.iter().copied().find(|index| {
                mark -= weight(*index);
                mark < 0
            });
        }
        if self.credit.len() != candidates.len() {
            self.credit.clear();
            self.credit.resize(candidates.len(), 0);
        }
        let mut best: Option<(i64, usize)> = None;
        for &index in &self.survivors {
            let owed = self.credit.get_mut(index)?;
            *owed += weight(index);
            if best.is_none_or(|(most, _)| *owed > most) && weight(index) > 0 {
                best = Some((*owed, index));
            }
        }
        let (_, index) = best?;
        *self.credit.get_mut(index)? -= total;
        Some(index)
    }

    fn by_policy(
        &mut self,
        candidates: &[Candidate],
        aim: &Aim,
        now: Tick,
        rng: &mut Rng,
    ) -> Option<usize> {
        match (aim.policy, aim.latency_target) {
            (Policy::Latency, _) | (Policy::Balanced, None) => {}
            (Policy::Cost, _) => self.keep_cheapest(candidates, |_| true),
            (Policy::Balanced, Some(target)) => {
                self.keep_cheapest(candidates, |it| it.vitals.latency.project(now) <= target);
            }
        }
        let (first, second) = draw_two(&self.survivors, rng)?;
        let score =
            |index: usize| candidates.get(index).map_or(f32::INFINITY, |it| it.score(aim, now));
        let (one, other) = (score(first), score(second));
        let second_wins = other < one || (other == one && rng.bool());
        Some(if second_wins { second } else { first })
    }

    /// Leaves the cheapest of the survivors that `qualify`; all of them when none does.
    fn keep_cheapest(&mut self, candidates: &[Candidate], qualify: impl Fn(&Candidate) -> bool) {
        let qualified = |index: usize| candidates.get(index).filter(|it| qualify(it));
        let price = |index: usize| qualified(index).map(Candidate::price_order);
        let cheapest = self.survivors.iter().filter_map(|index| price(*index)).min();
        if cheapest.is_some() {
            // A latency that was read twice may have moved; the list must not become empty by it.
            let before = self.survivors.first().copied();
            self.survivors.retain(|index| price(*index) == cheapest);
            if self.survivors.is_empty() {
                self.survivors.extend(before);
            }
        }
    }
}

/// Whether the weights of a tier are shares: at least two of them differ.
fn shared(candidates: &[Candidate], tier: Tier) -> bool {
    let mut weights = candidates.iter().filter(|it| it.tier == tier).map(|it| it.weight);
    weights.next().is_some_and(|first| weights.any(|weight| weight != first))
}

/// Two different ones at random; the same twice when there is only one.
fn draw_two(survivors: &[usize], rng: &mut Rng) -> Option<(usize, usize)> {
    match *survivors {
        [] => None,
        [only] => Some((only, only)),
        [first, second] => Some((first, second)),
        _ => {
            let one = rng.usize(..survivors.len());
            // Drawn from the others: the last takes the place of the one that is taken.
            let other = rng.usize(..survivors.len() - 1);
            let other = if other == one { survivors.len() - 1 } else { other };
            Some((*survivors.get(one)?, *survivors.get(other)?))
        }
    }
}

fn refusal(candidates: &[Candidate], aim: &Aim, now: Tick) -> NoChoice {
    if candidates.is_empty() {
        return NoChoice::Empty;
    }
    if candidates.iter().any(|it| it.standing(aim, now) == Standing::Full) {
        return NoChoice::Full;
    }
    let probes =
        candidates.iter().filter_map(|it| it.vitals.breaker.view(&aim.circuit, now).next_probe);
    NoChoice::CircuitOpen { retry_at: probes.min() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{
        Just, Strategy, any, prop_assert, prop_assert_eq, prop_assume, prop_oneof, proptest,
    };

    use super::*;
    use crate::{
        balance::{Flight, Outcome},
        model::{AuthMethod, EndpointId},
    };

    const NOW: Tick = Tick(1_000_000_000);

    fn endpoint(place: &str, weight: u32, state: EndpointState) -> Endpoint {
        Endpoint {
            id: EndpointId::try_from("a".to_owned()).unwrap(),
            url: "https://data.example".parse().unwrap(),
            found_at: None,
            internal_url: None,
            private_url: None,
            place: place.parse().unwrap(),
            zone: None,
            auth_method: AuthMethod::BearerToken,
            weight,
            state,
        }
    }

    fn candidate(weight: u32, state: EndpointState, millis: u64, price: i64) -> Candidate {
        let vitals = Arc::new(Vitals::new(Tick(0)));
        vitals.latency.observe(Duration::from_millis(millis), NOW);
        let endpoint = endpoint("aws_us_east_1", weight, state);
        Candidate::new(&endpoint, 0, Some(NanoUsd(price)), None, vitals)
    }

    fn active(millis: u64, price: i64) -> Candidate {
        candidate(100, EndpointState::Active, millis, price)
    }

    fn aim(policy: Policy, latency_target: Option<Duration>) -> Aim {
        let routing = Routing { policy, latency_target, ..Routing::default() };
        Aim::new(&routing, &Circuit::default())
    }

    fn open(candidate: &Candidate) {
        for _ in 0..5 {
            let circuit = Circuit::default();
            let pass = candidate.vitals.breaker.admit(&circuit, NOW).unwrap();
            candidate.vitals.breaker.settle(pass, Outcome::Failure, &circuit, NOW);
        }
    }

    /// How often each was chosen in `times` choices, and the refusals.
    fn tally(candidates: &[Candidate], aim: &Aim, times: usize) -> Vec<usize> {
        let (mut picker, mut rng) = (Picker::default(), Rng::with_seed(7));
        let mut counts = vec![0; candidates.len()];
        for _ in 0..times {
            let chosen = picker.choose(candidates, &Tried::default(), aim, NOW, &mut rng).unwrap();
            counts[chosen.index] += 1;
        }
        counts
    }

    fn choose(candidates: &[Candidate], tried: &[usize]) -> Result<usize, NoChoice> {
        let tried = Tried(tried.iter().copied().collect());
        let aim = aim(Policy::Latency, None);
        Picker::default()
            .choose(candidates, &tried, &aim, NOW, &mut Rng::with_seed(1))
            .map(|chosen| chosen.index)
    }

    #[test]
    fn of_two_the_faster_wins_until_it_is_busier() {
        let candidates = [active(10, 0), active(35, 0)];
        let aim = aim(Policy::Latency, None);
        assert_eq!(tally(&candidates, &aim, 50), [50, 0]);
        let _busy: Vec<_> = (0..3).map(|_| Flight::begin(candidates[0].vitals().clone())).collect();
        assert_eq!(tally(&candidates, &aim, 50), [0, 50]);
    }

    #[test]
    fn equals_share_the_load() {
        let candidates = [active(10, 0), active(10, 0), active(10, 0)];
        let counts = tally(&candidates, &aim(Policy::Latency, None), 3000);
        assert!(counts.iter().all(|count| (850..1150).contains(count)), "{counts:?}");
    }

    #[test]
    fn cost_takes_the_cheapest_path_however_slow() {
        let candidates = [active(1, 90_000_000), active(80, 20_000_000), active(2, 90_000_000)];
        assert_eq!(tally(&candidates, &aim(Policy::Cost, None), 20), [0, 20, 0]);
        open(&candidates[1]);
        assert_eq!(tally(&candidates, &aim(Policy::Cost, None), 20)[1], 0);
    }

    #[test]
    fn balanced_takes_the_cheapest_within_the_target_and_else_the_fastest() {
        let candidates = [active(1, 90_000_000), active(80, 20_000_000), active(20, 50_000_000)];
        let target = |millis| aim(Policy::Balanced, Some(Duration::from_millis(millis)));
        assert_eq!(tally(&candidates, &target(100), 20), [0, 20, 0]);
        assert_eq!(tally(&candidates, &target(50), 20), [0, 0, 20]);
        let slow = [active(70, 90_000_000), active(80, 20_000_000)];
        assert_eq!(tally(&slow, &target(50), 20), [20, 0]);
    }

    #[test]
    fn balanced_without_a_target_weighs_price_against_latency() {
        // 10 ms × (1 + 9) against 30 ms × (1 + 0).
        let candidates = [active(10, 90_000_000), active(30, 0)];
        assert_eq!(tally(&candidates, &aim(Policy::Balanced, None), 20), [0, 20]);
        assert_eq!(tally(&candidates, &aim(Policy::Latency, None), 20), [20, 0]);
    }

    #[test]
    fn an_unknown_price_is_the_highest() {
        let mut unknown = active(1, 0);
        unknown.price = None;
        let candidates = [unknown, active(80, 900_000_000)];
        assert_eq!(tally(&candidates, &aim(Policy::Cost, None), 20), [0, 20]);
    }

    #[test]
    fn standby_and_draining_wait_their_turn() {
        let of = |state| candidate(100, state, 10, 0);
        let candidates = [
            of(EndpointState::Draining),
            of(EndpointState::Standby),
            candidate(100, EndpointState::Active, 500, 0),
        ];
        assert_eq!(choose(&candidates, &[]), Ok(2));
        assert_eq!(choose(&candidates, &[2]), Ok(1));
        assert_eq!(choose(&candidates, &[2, 1]), Ok(0));
        candidates[2].vitals.set_healthy(false);
        assert_eq!(choose(&candidates, &[]), Ok(1));
    }

    #[test]
    fn nearer_ones_come_first_while_one_is_left() {
        let mut far = active(1, 0);
        far.rank = 2;
        let candidates = [far, active(300, 0)];
        assert_eq!(choose(&candidates, &[]), Ok(1));
        candidates[1].vitals.set_healthy(false);
        assert_eq!(choose(&candidates, &[]), Ok(0));
    }

    #[test]
    fn the_last_one_left_is_used_although_it_was_tried_and_is_unhealthy() {
        let candidates = [active(1, 0)];
        candidates[0].vitals.set_healthy(false);
        assert_eq!(choose(&candidates, &[0]), Ok(0));
    }

    #[test]
    fn nothing_is_sent_into_open_circuits_and_full_endpoints() {
        assert_eq!(choose(&[], &[]), Err(NoChoice::Empty));
        let mut candidates = [active(1, 0), active(2, 0)];
        open(&candidates[0]);
        assert_eq!(choose(&candidates, &[1]), Ok(1));
        open(&candidates[1]);
        let retry_at = Some(NOW.after(Duration::from_mins(1)));
        assert_eq!(choose(&candidates, &[]), Err(NoChoice::CircuitOpen { retry_at }));
        candidates[0] = active(1, 0);
        candidates[0].most_in_flight = 1;
        let _flight = Flight::begin(candidates[0].vitals().clone());
        assert_eq!(choose(&candidates, &[]), Err(NoChoice::Full));
    }

    #[test]
    fn a_circuit_whose_time_has_come_gets_one_probe() {
        let candidates = [active(1, 0)];
        open(&candidates[0]);
        let later = NOW.after(Duration::from_mins(1));
        let (mut picker, mut rng) = (Picker::default(), Rng::with_seed(1));
        let aim = aim(Policy::Latency, None);
        let mut ask = || picker.choose(&candidates, &Tried::default(), &aim, later, &mut rng);
        assert!(ask().unwrap().pass.is_probe());
        assert!(matches!(ask(), Err(NoChoice::CircuitOpen { .. })));
    }

    #[test]
    fn ninety_to_ten_is_exactly_that() {
        let weigh = |weight| candidate(weight, EndpointState::Active, 10, 0);
        let candidates = [weigh(90), weigh(10)];
        assert_eq!(tally(&candidates, &aim(Policy::Latency, None), 1000), [900, 100]);
        let without = [weigh(90), weigh(10), weigh(0)];
        assert_eq!(tally(&without, &aim(Policy::Cost, None), 100), [90, 10, 0]);
        without[0].vitals.set_healthy(false);
        without[1].vitals.set_healthy(false);
        assert_eq!(tally(&without, &aim(Policy::Cost, None), 10), [0, 0, 10]);
    }

    #[test]
    fn shares_stay_shares_when_the_odd_one_is_gone() {
        let weigh = |weight, millis| candidate(weight, EndpointState::Active, millis, 0);
        let candidates = [weigh(80, 1), weigh(10, 1), weigh(10, 900)];
        candidates[0].vitals.set_healthy(false);
        assert_eq!(tally(&candidates, &aim(Policy::Latency, None), 100), [0, 50, 50]);
    }

    #[test]
    fn nearness_counts_as_far_as_the_locality_says() {
        let here: Place = "aws_us_east_1".parse().unwrap();
        let zone: Zone = "us-east-1a".parse().unwrap();
        let mut same = endpoint("aws_us_east_1", 100, EndpointState::Active);
        let region = same.clone();
        same.zone = Some(zone.clone());
        let provider = endpoint("aws_eu_west_1", 100, EndpointState::Active);
        let other = endpoint("azure_eastus", 100, EndpointState::Active);
        let ranks = |locality| {
            [&same, &region, &provider, &other]
                .map(|endpoint| Candidate::rank(locality, &here, Some(&zone), endpoint))
        };
        assert_eq!(ranks(Locality::None), [0, 0, 0, 0]);
        assert_eq!(ranks(Locality::Provider), [0, 0, 0, 1]);
        assert_eq!(ranks(Locality::Region), [0, 0, 1, 2]);
        assert_eq!(ranks(Locality::Zone), [0, 1, 2, 3]);
    }

    fn any_candidate() -> impl Strategy<Value = (Candidate, bool)> {
        let states = prop_oneof![
            Just(EndpointState::Active),
            Just(EndpointState::Standby),
            Just(EndpointState::Draining),
        ];
        let parts = (0u32..4, states, 1u64..500, 0i64..3, any::<bool>(), 0u8..6, 0u8..3);
        parts.prop_map(|(weight, state, millis, price, healthy, fate, rank)| {
            let mut candidate = candidate(weight, state, millis, price * 10_000_000);
            candidate.rank = rank;
            candidate.vitals.set_healthy(healthy);
            if fate == 0 {
                open(&candidate);
            }
            (candidate, fate == 1)
        })
    }

    proptest! {
        #[test]
        fn a_worse_one_is_never_chosen_while_a_better_one_is_left(
            drawn in proptest::collection::vec(any_candidate(), 1..12),
            policy in prop_oneof![Just(Policy::Latency), Just(Policy::Cost), Just(Policy::Balanced)],
            seed in any::<u64>(),
        ) {
            let tried = Tried((0..drawn.len()).filter(|index| drawn[*index].1).collect());
            let candidates: Vec<_> = drawn.iter().map(|it| it.0.clone()).collect();
            let aim = aim(policy, Some(Duration::from_millis(100)));
            let mut picker = Picker::default();
            let mut rng = Rng::with_seed(seed);
            let usable: Vec<_> =
                candidates.iter().filter(|it| it.standing(&aim, NOW) <= Standing::Unhealthy).collect();
            for _ in 0..20 {
                let Ok(chosen) = picker.choose(&candidates, &tried, &aim, NOW, &mut rng) else {
                    prop_assert!(usable.is_empty());
                    continue;
                };
                let it = &candidates[chosen.index];
                prop_assert!(chosen.standing <= Standing::Unhealthy);
                let fit = |it: &Candidate| it.standing(&aim, NOW) == Standing::Fit;
                prop_assert!(fit(it) || !candidates.iter().any(fit));
                let untried = |index: usize| fit(&candidates[index]) && !tried.contains(index);
                let any_untried = (0..candidates.len()).any(untried);
                prop_assert!(untried(chosen.index) || !any_untried);
                if any_untried {
                    let best = (0..candidates.len()).filter(|i| untried(*i)).map(|i| candidates[i].tier).min();
                    prop_assert_eq!(Some(it.tier), best);
                }
            }
        }

        #[test]
        fn shares_are_exact_over_every_full_round(
            weights in proptest::collection::vec(0u32..20, 2..8),
            rounds in 1usize..5,
        ) {
            prop_assume!(weights.iter().any(|weight| *weight != weights[0]));
            let total: u32 = weights.iter().sum();
            let candidates: Vec<_> =
                weights.iter().map(|weight| candidate(*weight, EndpointState::Active, 10, 0)).collect();
            let times = usize::try_from(total).unwrap() * rounds;
            let counts = tally(&candidates, &aim(Policy::Latency, None), times);
            for (count, weight) in counts.iter().zip(&weights) {
                prop_assert_eq!(*count, usize::try_from(*weight).unwrap() * rounds);
            }
        }

        #[test]
        fn shares_are_within_one_choice_at_any_moment_for_two(
            heavy in 2u32..100, light in 1u32..100, times in 1usize..500,
        ) {
            prop_assume!(heavy != light);
            let candidates = [heavy, light].map(|weight| candidate(weight, EndpointState::Active, 10, 0));
            let counts = tally(&candidates, &aim(Policy::Latency, None), times);
            let due = f64::from(u32::try_from(times).unwrap()) * f64::from(heavy) / f64::from(heavy + light);
            let got = f64::from(u32::try_from(counts[0]).unwrap());
            prop_assert!((got - due).abs() <= 1.0, "{got} of {due}");
        }
    }
}
